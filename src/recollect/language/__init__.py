"""Language models that adapt while they read.

model, lstm                what a language model is; the paper's LSTM
vocabulary                 a text file becomes word numbers
train                      truncated backpropagation through time, stopped and resumed at any moment
  recurrent, loss          the LSTM's recurrence and the softmax over a large vocabulary, with their gradients
evaluate                   reads a text with any predictor: predict, score, then write
  collected                what was found word by word
dynamic                    dynamic evaluation: all weights follow the text
reading, grid, window      every setting of cache and MbPA from one reading
settings, choose           what is tried, and what is best
report                     weights of mixtures, confidence intervals, gains by frequency
static                     kNN-LM: a memory of the training text
"""

from recollect.language.choose import Choice, choose, keys_of, predictor
from recollect.language.dynamic import DynamicEvaluation, gradient_statistics
from recollect.language.evaluate import Evaluation, evaluate
from recollect.language.grid import Scores, score
from recollect.language.lstm import LSTMModel, State
from recollect.language.model import LanguageModel
from recollect.language.reading import Reading, read, read_dynamically
from recollect.language.report import (
    Bucket,
    Fitted,
    Interval,
    articles,
    blocks,
    fit_weights,
    gain_by_frequency,
    interval,
)
from recollect.language.schedule import Schedule
from recollect.language.settings import CacheGrid, CacheSetting, MbPAGrid, MbPASetting
from recollect.language.static import knn_lm, remember
from recollect.language.train import Step, Turn, train
from recollect.language.vocabulary import Vocabulary
from recollect.memory import Static

__all__ = [
    "Bucket",
    "CacheGrid",
    "CacheSetting",
    "Choice",
    "DynamicEvaluation",
    "Evaluation",
    "Fitted",
    "Interval",
    "LSTMModel",
    "LanguageModel",
    "MbPAGrid",
    "MbPASetting",
    "Reading",
    "Schedule",
    "Scores",
    "State",
    "Static",
    "Step",
    "Turn",
    "Vocabulary",
    "articles",
    "blocks",
    "choose",
    "evaluate",
    "fit_weights",
    "gain_by_frequency",
    "gradient_statistics",
    "interval",
    "keys_of",
    "knn_lm",
    "predictor",
    "read",
    "read_dynamically",
    "remember",
    "score",
    "train",
]
