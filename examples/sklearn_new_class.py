"""A scikit-learn pipeline in use learns a digit that it was not trained for, from twenty examples, by partial_fit.

Nothing is trained again: the examples go to a memory, and count at once. MLPClassifier refuses the new class.
Run: python examples/sklearn_new_class.py
"""

import tempfile

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler

from recollect.integrations.sklearn import MbPAClassifier


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(images, labels, test_size=500, random_state=0)
    old, nines = train_labels != 9, np.flatnonzero(train_labels == 9)[:20]
    is_nine = test_labels == 9

    def report(when: str, predicted: np.ndarray) -> None:
        right = predicted == test_labels
        print(f"{when:<32}{right[is_nine].mean():7.1%}{right[~is_nine].mean():9.1%}")

    print(f"{'accuracy on test images of':<32}{'9':>7}{'0 to 8':>9}")
    pipeline = make_pipeline(MinMaxScaler(), MbPAClassifier(random_state=0))
    pipeline.fit(train[old], train_labels[old])
    report("trained on 0 to 8", pipeline.predict(test))

    scaler, model = pipeline[:-1], pipeline[-1]  # a pipeline has no partial_fit of its own
    model.partial_fit(scaler.transform(train[nines]), train_labels[nines])
    report("20 nines by partial_fit", pipeline.predict(test))

    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        again = MbPAClassifier.load(folder)
    report("saved, and loaded without pickle", again.predict(scaler.transform(test)))

    other = MLPClassifier(random_state=0).partial_fit(train[old], train_labels[old], classes=range(9))
    try:
        other.partial_fit(train[nines], train_labels[nines])
    except ValueError as error:
        print(f"MLPClassifier: {error}")


if __name__ == "__main__":
    main()
