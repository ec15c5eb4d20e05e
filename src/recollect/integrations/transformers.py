"""``CausalLM``: any causal language model of Hugging Face transformers, as the tools of ``recollect.language`` take it.

    lm = CausalLM(AutoModelForCausalLM.from_pretrained("gpt2"), context=512)
    memory = EpisodicMemory(capacity=5_000, key_size=lm.hidden_size, history=256)
    adapted = MbPA(lm.decoder, memory, neighbors=256, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1))
    cache = neural_cache(memory, classes=lm.vocabulary, flatness=0.01)
    output = Mixture(Parametric(lm.decoder), adapted, cache, weights=(0.8, 0.1, 0.1))
    evaluate(lm.hidden, output, memory, tokens).perplexity

So do dynamic evaluation (``DynamicEvaluation(lm, ...)``) and the kNN language model (``remember`` and ``knn_lm``).
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recollect.continual.modes import evaluation
from recollect.errors import (
    HeadError,
    MissingExtraError,
    SettingError,
    ShapeError,
)
from recollect.language.model import check_tokens


class Window(NamedTuple):
    """What a ``CausalLM`` carries from one segment of a text to the next."""

    words: Int[Tensor, "b n"]
    """The words of the window so far."""
    cache: Any
    """The keys and values that the model's attention has of them, a ``transformers.DynamicCache``."""


class CausalLM:
    """A causal language model of transformers as a ``recollect.language.LanguageModel``.

    ``hidden`` maps words to what goes into the model's output embedding, and ``decoder`` is that embedding, so
    ``decoder(hidden)`` are the model's own logits and ``MbPA(lm.decoder, memory, ...)`` takes its place.

    A text may be longer than what the model can look back on, and it can be handed over in segments of any length:
    windows lie at fixed places of the text. The first window begins with the text, each of the others ``stride`` words
    after the one before, and all of them have room for ``context`` words. A word is read in the first window that
    reaches it, so that the model sees, that word included,

    - all words up to it for the first ``context`` words of the text,
    - at least ``context - stride + 1`` and at most ``context`` words from then on.

    Within a window nothing is computed twice. At its beginning the ``context - stride`` words that it shares with the
    one before are read anew, as their places in it are others: with the default of half the context every word is
    read twice, and a smaller stride buys more context at the price of ``context / stride`` times the work.

    The model is always run in evaluation mode and left in its own. The weights belong to the model, which is shared,
    not copied: what trains or moves it does so here too. ``evaluate`` needs distributions that sum to one to within
    0.1%, so load the model in float32 or put it there with ``model.float()``.

    *Differs from kNN-LM*: Khandelwal et al. search by the input of the last block's feed-forward layer, behind its
    layer norm; here both the search and the softmax layer take the input of the softmax layer.

    Args:
        model: Such as ``AutoModelForCausalLM.from_pretrained("gpt2")``. It must keep keys and values in a
            ``DynamicCache``, and its logits must be those of a linear output embedding and nothing else.
        context: The most words that the model sees at once; all that it has positions for when None.
        stride: How many words apart the windows begin; half the context when None.

    Raises:
        MissingExtraError: If transformers is not installed.
        SettingError: If ``model`` is no transformers model, ``context`` exceeds its positions, or a number is out of
            its range.
        HeadError: If it has no linear output embedding, its logits do not follow from that alone (a soft cap or a
            scale behind it), or it cannot go on from a cache.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> sizes = {"vocab_size": 100, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
        >>> lm = CausalLM(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)))
        >>> hidden, state = lm.hidden(torch.tensor([[3, 1, 4]]))
        >>> lm.decoder(hidden).shape
        torch.Size([1, 3, 100])
    """

    def __init__(self, model: nn.Module, *, context: int | None = None, stride: int | None = None) -> None:
        try:
            from transformers import DynamicCache, PreTrainedModel
        except ImportError as error:
            raise MissingExtraError("CausalLM needs transformers: pip install 'recollect[transformers]'.") from error
        if not isinstance(model, PreTrainedModel):
            raise SettingError(
                f"model must be one of transformers, as AutoModelForCausalLM.from_pretrained() returns, got {model!r}."
            )
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if model.config.is_encoder_decoder or not isinstance(head, nn.Linear):
            raise HeadError(
                f"{type(model).__name__} is no decoder with a linear output embedding. Load the model with "
                "AutoModelForCausalLM."
            )
        self._model = model
        self._new_cache = DynamicCache
        self._output = head
        known = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else head.out_features
        self._words = min(head.out_features, known)  # either may be padded
        self.context, self.stride = self._sizes(context, stride)
        self._probe()

    def _sizes(self, context: int | None, stride: int | None) -> tuple[int, int]:
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if context is None and positions is None:
            raise SettingError(f"{type(self._model).__name__} has positions without end: say how many with context=.")
        context = positions if context is None else context
        if isinstance(context, bool) or not isinstance(context, int) or context < 1:
            raise SettingError(f"context must be a whole number above 0, got {context!r}.")
        if positions is not None and context > positions:
            raise SettingError(f"this model has {positions} positions, which is too few for context={context}.")
        stride = max(1, context // 2) if stride is None else stride
        if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= context:
            raise SettingError(f"stride must be a whole number from 1 to the context of {context}, got {stride!r}.")
        return context, stride

    @torch.no_grad()
    def _probe(self) -> None:
        """Reads a few words: at once, and in two segments."""
        name = type(self._model).__name__
        words = torch.arange(min(3, self.context), device=self._output.weight.device).unsqueeze(0) % self._words
        try:
            with evaluation(self._model):
                logits = self._model(input_ids=words, use_cache=False, return_dict=True).logits
                whole = self._model.base_model(input_ids=words, use_cache=False, return_dict=True).last_hidden_state
                own = self._output(whole)
            parts, state = self.hidden(words[:, :1])
            if words.shape[1] > 1:
                parts = torch.cat([parts, self.hidden(words[:, 1:], state)[0]], 1)
        except (AttributeError, TypeError, ValueError) as error:
            raise HeadError(
                f"{name} cannot be run as a causal language model with a DynamicCache: {type(error).__name__}: {error}"
            ) from error
        precision = max(torch.finfo(part.dtype).eps for part in (own, logits))  # some models turn logits into float32
        if own.shape != logits.shape or not _close(own, logits, 4 * precision):
            raise HeadError(
                f"the logits of {name} are not those of its output embedding: it has a soft cap, a scale or another "
                "layer there. Whatever adapts the embedding would leave that out, so this model cannot be used."
            )
        if not _close(parts, whole, precision**0.5):
            raise HeadError(
                f"{name} reads words otherwise in two segments than at once: it looks ahead, or takes no DynamicCache."
            )

    @property
    def output(self) -> nn.Linear:
        """The output embedding."""
        return self._output

    @property
    def decoder(self) -> nn.Linear:
        """The same: maps hidden states to logits."""
        return self._output

    @property
    def vocabulary(self) -> int:
        """The number of words that the model has logits for."""
        return self._output.out_features

    @property
    def hidden_size(self) -> int:
        """The length of what ``hidden`` returns."""
        return self._output.in_features

    def hidden(self, tokens: Int[Tensor, "b t"], state: Window | None = None) -> tuple[Float[Tensor, "b t d"], Window]:
        """Returns what goes into the output embedding after each word, and what is needed to go on.

        The state is not changed: one can go on from it more than once. Gradients go to the weights through the words
        of this call, but no further back than to ``state``, and through no word that a new window reads anew.

        Args:
            tokens: The words of ``b`` texts by number.
            state: As returned for the segment before; the beginning of the texts when None.

        Raises:
            LabelError: If a word's number is not in the vocabulary.
            ShapeError: If there are no words, or the state is that of another number of texts.
            DtypeError, DeviceError: If the words are no whole numbers, or on another device than the model.
        """
        left = check_tokens("tokens", tokens, vocabulary=self._words, device=self._output.weight.device)
        if state is None:
            state = Window(left[:, :0], self._empty())
        if len(state.words) != len(left):
            raise ShapeError(f"the state is that of {len(state.words)} texts, but there are words of {len(left)}.")
        words, cache = state.words, copy.deepcopy(state.cache)
        parts = []
        with evaluation(self._model):
            while left.shape[1]:
                if words.shape[1] == self.context:
                    words, cache = words[:, self.stride :], self._empty()
                    if words.shape[1]:
                        with torch.no_grad():
                            self._read(words, cache)
                some, left = left.tensor_split((self.context - words.shape[1],), dim=1)
                parts.append(self._read(some, cache))
                words = torch.cat([words, some], 1)
        _detach(cache)
        return torch.cat(parts, 1), Window(words, cache)

    def inputs(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Returns what it is given: ``hidden`` is what goes into the softmax layer."""
        return hidden

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that are not frozen (``requires_grad``), each once; a tied weight by its first name."""
        return ((name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad)

    def _empty(self) -> Any:
        return self._new_cache(config=self._model.config)

    def _read(self, tokens: Tensor, cache: Any) -> Float[Tensor, "b t d"]:
        """Reads words that come after those of the cache, which remembers them."""
        model = self._model.base_model
        return model(input_ids=tokens, past_key_values=cache, use_cache=True, return_dict=True).last_hidden_state


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same to within a part of their largest number."""
    one, other = one.double(), other.double()
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def _detach(cache: Any) -> None:
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.requires_grad:
                setattr(layer, name, value.detach())
