"""Small tasks drawn from many classes: few-shot episodes, and sequences that show a few classes again and again.

Images come by class, ``(classes, images of a class, ...)``, and the classes that may be drawn are rows of that array.
All tasks of a call are drawn at once; the draws are made where the generator lives, the images stay where they are.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from recollect.data.images import Images
from recollect.errors import (
    DtypeError,
    SettingError,
    ShapeError,
    require,
    require_number,
    require_tensor,
    require_whole,
)


class Episodes(NamedTuple):
    """Few-shot tasks, task by task: what to learn from, and what to be judged by."""

    support: Float[Tensor, "t s *shape"]
    support_labels: Int[Tensor, "t s"]
    queries: Float[Tensor, "t q *shape"]
    query_labels: Int[Tensor, "t q"]
    classes: Int[Tensor, "t ways"]
    """The row of each label's class in the array that it was drawn from."""


class Sequences(NamedTuple):
    """Tasks that show images of a few classes one after the other."""

    inputs: Float[Tensor, "t s *shape"]
    labels: Int[Tensor, "t s"]
    classes: Int[Tensor, "t ways"]
    """The row of each label's class in the array that it was drawn from."""


def episodes(
    images: Shaped[Tensor, "c n *shape"],
    classes: Int[Tensor, " m"],
    *,
    tasks: int,
    ways: int,
    shots: int,
    queries: int,
    turned: bool = False,
    generator: torch.Generator,
) -> Episodes:
    """Returns few-shot tasks: some images of a few classes to learn from, and others of these classes to be judged by.

    Each task draws its classes without replacement, and labels them 0 to ``ways - 1`` in random order. Images of a
    class are drawn without replacement too. They stand round after round, one of each class: the labels of a task are
    0, 1, ..., ways - 1, 0, 1, ....

    Paper: Vinyals et al. (2016), *Matching Networks for One Shot Learning*, arXiv:1606.04080, Section 4.1; Finn et al.
    (2017), *Model-Agnostic Meta-Learning*, arXiv:1703.03400, Section 5.2.

    Args:
        images: Images by class. Bytes become numbers in [0, 1], and truth values 0 and 1.
        classes: The rows of ``images`` that may be drawn.
        tasks: How many tasks.
        ways: Classes of a task.
        shots: Images of each class to learn from.
        queries: Images of each class to be judged by.
        turned: Whether each class of a task is turned by 0, 90, 180 or 270 degrees, drawn at random, which makes four
            classes of each. All four are in the split where the class is, and no task has two of them. As in the codes
            of MAML and MANN.
        generator: The source of all draws.

    Raises:
        SettingError: If a number is below 1, there are more ways than classes or more images asked for than a class
            has, ``classes`` is empty or names a row twice or one that is not there, or ``generator`` is none.
        ShapeError, DtypeError: If ``images`` and ``classes`` are not what they should be, or images to be turned are
            not square.

    Example:
        >>> import torch
        >>> images = torch.arange(12.0).view(4, 3, 1)  # 4 classes of 3 images of one pixel
        >>> some = episodes(
        ...     images, torch.arange(4), tasks=2, ways=2, shots=1, queries=2, generator=torch.Generator().manual_seed(0)
        ... )
        >>> some.support.shape, some.queries.shape
        (torch.Size([2, 2, 1]), torch.Size([2, 4, 1]))
        >>> some.support_labels.tolist(), some.query_labels.tolist()
        ([[0, 1], [0, 1]], [[0, 1, 0, 1], [0, 1, 0, 1]])
    """
    for name, number in (("tasks", tasks), ("ways", ways), ("shots", shots), ("queries", queries)):
        require_whole(name, number)
    _check(images, classes, ways=ways, each=shots + queries, what=f"shots + queries = {shots} + {queries}")
    _require_generator(generator)
    chosen = _rows(classes, tasks, ways, generator)
    places = _distinct((tasks, ways), images.shape[1], shots + queries, generator).transpose(1, 2)
    rows = chosen[:, None].expand_as(places)
    turns = _turns((tasks, ways), generator)[:, None].expand_as(places) if turned else None
    found = _taken(images, rows.flatten(1), places.flatten(1), None if turns is None else turns.flatten(1))
    labels = torch.arange(ways, device=images.device).repeat(tasks, shots + queries)
    cut = ways * shots
    return Episodes(
        _unit(found[:, :cut]), labels[:, :cut], _unit(found[:, cut:]), labels[:, cut:], chosen.to(images.device)
    )


def sequences(
    images: Shaped[Tensor, "c n *shape"],
    classes: Int[Tensor, " m"],
    *,
    tasks: int,
    ways: int,
    instances: int,
    turned: bool = False,
    generator: torch.Generator,
) -> Sequences:
    """Returns sequences that show ``instances`` images of each of a few classes, in random order.

    Each sequence draws its classes without replacement, and labels them 0 to ``ways - 1`` in random order: a label
    means nothing beyond its sequence. No image comes twice. The learner of the paper is given each label one step after
    its image; that shift is its own business.

    Paper: Santoro et al. (2016), *One-shot Learning with Memory-Augmented Neural Networks*, arXiv:1605.06065,
    Section 4.1: 5 or 15 classes, 10 images of each.

    Args:
        images: See ``episodes``.
        classes: The rows of ``images`` that may be drawn.
        tasks: How many sequences.
        ways: Classes of a sequence.
        instances: Images of each class: sequences have ``ways * instances`` steps.
        turned: See ``episodes``.
        generator: The source of all draws.

    Raises:
        SettingError, ShapeError, DtypeError: See ``episodes``.

    Example:
        >>> import torch
        >>> images = torch.arange(12.0).view(4, 3, 1)  # 4 classes of 3 images of one pixel
        >>> some = sequences(
        ...     images, torch.arange(4), tasks=1, ways=2, instances=3, generator=torch.Generator().manual_seed(0)
        ... )
        >>> some.inputs.shape, some.labels.tolist()
        (torch.Size([1, 6, 1]), [[1, 0, 0, 1, 1, 0]])
    """
    for name, number in (("tasks", tasks), ("ways", ways), ("instances", instances)):
        require_whole(name, number)
    _check(images, classes, ways=ways, each=instances, what=f"instances = {instances}")
    _require_generator(generator)
    chosen = _rows(classes, tasks, ways, generator)
    places = _distinct((tasks, ways), images.shape[1], instances, generator).flatten(1)
    turns = _turns((tasks, ways), generator) if turned else None
    order = _distinct((tasks,), ways * instances, ways * instances, generator)
    labels = order // instances
    found = _taken(
        images, chosen.gather(1, labels), places.gather(1, order), None if turns is None else turns.gather(1, labels)
    )
    return Sequences(_unit(found), labels.to(images.device), chosen.to(images.device))


def jittered(
    images: Float[Tensor, "*batch h w"], *, angle: float = 11.25, shift: float = 10 / 105, generator: torch.Generator
) -> Float[Tensor, "*batch h w"]:
    """Returns images that are each turned and moved a little, by uniformly drawn amounts.

    Pixels are interpolated bilinearly; what comes from outside an image is 0.

    Paper: Santoro et al. (2016), *One-shot Learning with Memory-Augmented Neural Networks*, arXiv:1605.06065, whose
    drawings are turned and moved so. The defaults are those of the code snowkylin/ntm, pi / 16 and 10 of 105 pixels.

    *Differs from that code:* drawings are moved after they were scaled, by parts of pixels, not before.

    Args:
        images: Such as the inputs of ``sequences``. A dimension for channels counts as one of the batch: where there
            are several, they are moved apart.
        angle: The largest angle, in degrees, either way.
        shift: The largest way, as a part of the images' height and width, in each direction.
        generator: The source of angles and shifts.

    Raises:
        SettingError: If ``angle`` or ``shift`` is no number of at least 0, or ``generator`` is none.
        ShapeError, DtypeError: If ``images`` are no images of floating-point numbers.

    Example:
        >>> import torch
        >>> jittered(torch.ones(3, 20, 20), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 20, 20])
    """
    require_number("angle", angle, low=0.0)
    require_number("shift", shift, low=0.0)
    _require_generator(generator)
    require_tensor("images", images)
    if images.dim() < 2:
        raise ShapeError(f"images must have shape (..., height, width), got {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise DtypeError(f"images must be floating-point numbers to be interpolated, got {images.dtype}.")
    rows = images.reshape(-1, 1, *images.shape[-2:])
    draws = 2 * torch.rand(3, len(rows), generator=generator, device=generator.device) - 1
    turn, down, right = draws.to(images) * torch.tensor([[math.radians(angle)], [2 * shift], [2 * shift]]).to(images)
    # Coordinates run from -1 to 1, so a shift by a whole side is 2; they are stretched where the sides differ.
    tall = images.shape[-2] / images.shape[-1]
    back = torch.stack([turn.cos(), turn.sin() * tall, right, -turn.sin() / tall, turn.cos(), down], -1).view(-1, 2, 3)
    grid = affine_grid(back, list(rows.shape), align_corners=False)
    return grid_sample(rows, grid, align_corners=False).view(images.shape)


def class_split(
    classes: int | Int[Tensor, " m"], *sizes: int, generator: torch.Generator
) -> tuple[Int[Tensor, " n"], ...]:
    """Returns groups of classes, drawn at random, of which no two share a class; each in rising order.

    The splits of published experiments:

    - Omniglot at random, 1,200 characters to learn from, 100 of them for validation, and 423 for the test:
      ``class_split(1623, 1100, 100, 423, generator=g)``. Santoro et al. (2016); Finn et al. (2017) and their code.
    - Omniglot by alphabets: ``class_split(data.background, 864, 100, generator=g)`` and ``data.evaluation``.
    - Tiny-ImageNet, in the proportions of mini-ImageNet's 64, 16 and 20 classes, rounded:
      ``class_split(200, 120, 40, 40, generator=g)``. It shares classes with mini-ImageNet, but results do not compare.

    Args:
        classes: Which classes there are, or how many, counted from 0.
        sizes: How many classes each group has.
        generator: The source of choices; the same seed gives the same groups.

    Raises:
        SettingError: If there are fewer classes than asked for, a class is named twice, a size is below 1, or
            ``generator`` is none.

    Example:
        >>> import torch
        >>> train, test = class_split(5, 3, 2, generator=torch.Generator().manual_seed(0))
        >>> train, test
        (tensor([0, 1, 4]), tensor([2, 3]))
    """
    if isinstance(classes, int):
        require_whole("classes", classes)
        classes = torch.arange(classes)
    require_tensor("classes", classes)
    for size in sizes:
        require_whole("sizes", size)
    if sum(sizes) > len(classes) or not sizes:
        raise SettingError(
            f"sizes must name at least one group and at most {len(classes)} classes in all, what there is, "
            f"got {sizes}. Ask for fewer."
        )
    _refuse_twice(classes)
    _require_generator(generator)
    order = torch.randperm(len(classes), generator=generator, device=generator.device).to(classes.device)
    groups = classes[order[: sum(sizes)]].split(list(sizes))
    return tuple(group.sort().values for group in groups)


def by_class(images: Images) -> UInt8[Tensor, "c n 3 h w"]:
    """Returns photographs by class, with the dimension of colors before height and width.

    Where the images of a class stand together already, as those of ``tiny_imagenet`` do, nothing is copied.

    Args:
        images: As many of each class. Labels count the classes.

    Raises:
        SettingError: If there are no images, or classes differ in their number of images.

    Example:
        >>> import torch
        >>> photographs = Images(torch.zeros(6, 64, 64, 3, dtype=torch.uint8), torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> by_class(photographs).shape
        torch.Size([2, 3, 3, 64, 64])
    """
    counts = images.labels.bincount()
    if len(counts) == 0 or (counts != counts[0]).any():
        found = f"{int(counts.min())} to {int(counts.max())} of a class" if len(counts) else "none"
        raise SettingError(f"images must be as many of each class, got {found}. Take as many of each.")
    if (images.labels.diff() < 0).any():
        images = images.take(images.labels.argsort(stable=True))
    return images.pixels.unflatten(0, (len(counts), -1)).permute(0, 1, 4, 2, 3)


def _check(images: Tensor, classes: Tensor, *, ways: int, each: int, what: str) -> None:
    require_tensor("images", images)
    require_tensor("classes", classes)
    if images.dim() < 2:
        raise ShapeError(f"images must have shape (classes, images of a class, ...), got {tuple(images.shape)}.")
    if not (images.is_floating_point() or images.dtype in {torch.uint8, torch.bool}):
        raise DtypeError(f"images must be bytes, truth values or floating-point numbers, got {images.dtype}.")
    if classes.dim() != 1:
        raise ShapeError(f"classes must have shape (m,), got {tuple(classes.shape)}.")
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise DtypeError(f"classes must be whole numbers, the rows of images, got {classes.dtype}.")
    if len(classes) == 0:
        raise SettingError("classes must name at least one row of images, got none.")
    if classes.min() < 0 or classes.max() >= len(images):
        raise SettingError(
            f"classes must name rows of images, from 0 to {len(images) - 1}, got {int(classes.min())} to "
            f"{int(classes.max())}."
        )
    _refuse_twice(classes)
    if ways > len(classes):
        raise SettingError(
            f"ways must be at most {len(classes)}, the number of classes to draw from, got {ways}. Ask for fewer ways, "
            "or give more classes."
        )
    if each > images.shape[1]:
        raise SettingError(f"{what} must be at most {images.shape[1]}, the images of a class. Ask for fewer.")


def _require_generator(generator: torch.Generator) -> None:
    require("generator", generator, torch.Generator, "a source of draws, such as torch.Generator().manual_seed(0)")


def _refuse_twice(classes: Tensor) -> None:
    values, counts = classes.unique(return_counts=True)
    if len(values) < len(classes):
        raise SettingError(f"classes must name each class once, got {int(values[counts.argmax()])} twice or more.")


def _distinct(lead: tuple[int, ...], count: int, size: int, generator: torch.Generator) -> Int[Tensor, "*lead size"]:
    """Returns ``size`` different numbers below ``count``, in random order, for each place of ``lead``."""
    return torch.rand(*lead, count, generator=generator, device=generator.device).topk(size).indices


def _rows(classes: Tensor, tasks: int, ways: int, generator: torch.Generator) -> Int[Tensor, "t ways"]:
    return classes.to(generator.device, torch.long)[_distinct((tasks,), len(classes), ways, generator)]


def _turns(shape: tuple[int, ...], generator: torch.Generator) -> Int[Tensor, "t ways"]:
    return torch.randint(4, shape, generator=generator, device=generator.device)


def _taken(
    images: Shaped[Tensor, "c n *shape"], rows: Tensor, places: Tensor, turns: Tensor | None
) -> Shaped[Tensor, "t s *shape"]:
    """Returns images by class and place, each turned by its number of quarter turns."""
    shape, each = rows.shape, images.shape[1]
    rows, places = rows.flatten().to(images.device), places.flatten().to(images.device)
    if images.stride(0) == each * images.stride(1):  # image after image: whole ones are copied, which is far faster
        found = images.flatten(0, 1).index_select(0, rows * each + places)
    else:
        found = images[rows, places]
    if turns is not None:
        found = _turned(found, turns.flatten().to(images.device))
    return found.unflatten(0, shape)


def _turned(images: Shaped[Tensor, "s *shape"], turns: Int[Tensor, " s"]) -> Shaped[Tensor, "s *shape"]:
    if images.dim() < 3 or images.shape[-1] != images.shape[-2]:
        raise ShapeError(f"images must be square to be turned, got shape {tuple(images.shape[1:])}.")
    order = turns.argsort()
    parts = images.index_select(0, order).split(turns.bincount(minlength=4).tolist())
    return torch.cat([part.rot90(turn, (-2, -1)) for turn, part in enumerate(parts)]).index_select(0, order.argsort())


def _unit(images: Shaped[Tensor, "t s *shape"]) -> Float[Tensor, "t s *shape"]:
    if images.dtype == torch.uint8:
        return images.float().div_(255)
    return images if images.is_floating_point() else images.float()
