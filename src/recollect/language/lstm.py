"""``LSTMModel``: the one-layer LSTM language model of the paper's Section 4.3, at any size."""

from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from recollect.errors import SettingError, ShapeError, require_number, require_whole
from recollect.language.loss import linear_cross_entropy
from recollect.language.model import check_tokens
from recollect.language.recurrent import unroll


class State(NamedTuple):
    """What an LSTM carries from one segment of a text to the next."""

    hidden: Float[Tensor, "b h"]
    cell: Float[Tensor, "b h"]


class _Weights(NamedTuple):
    """The LSTM's, in the order of ``nn.LSTM``."""

    ih: nn.Parameter
    hh: nn.Parameter
    bias_ih: nn.Parameter
    bias_hh: nn.Parameter


class LSTMModel(nn.Module):
    """Predicts the next word: embedding, LSTM, and a softmax layer that shares the embedding's matrix.

    Paper: Appendix C, "a single-layer LSTM with the regularization of Melis et al. (2017)": PTB 1194 hidden and 268
    embedding units, WikiText-2 1853 and 241. Where the two sizes differ, a projection without bias stands between the
    LSTM and the softmax layer.

    ``hidden`` maps words to the LSTM's outputs and ``decoder`` maps those to logits, so
    ``MbPA(lm.decoder, memory, ...)`` takes the place of the decoder. Embedding and softmax layer are one matrix; what
    adapts the decoder works on a copy, and leaves the embedding as it is.

    It is made on the CPU; ``.to(...)`` moves it. Words, states and generators must be on its device.

    Args:
        vocabulary: The number of words.
        hidden_size: Units of the LSTM.
        embedding_size: Units of the embedding, and of the input of the softmax layer.
        input_dropout: On the embeddings; a fresh mask for each word.
        state_dropout: On the state that each step sees; one mask for a segment (variational dropout).
        output_dropout: On the LSTM's output and again behind the projection.
        generator: Draws the initial weights: normal with a variance of 1 / inputs, cut off at two deviations (so that a
            variance of 0.774 / inputs is left); an orthogonal projection; biases 0, and 1 for the forget gate. (Melis
            et al., but for the cut's effect.) From torch's global random state when None.

    Raises:
        SettingError: If a size is not a positive whole number or a dropout not in [0, 1).

    Example:
        >>> lm = LSTMModel(100, hidden_size=16, embedding_size=8, generator=torch.Generator().manual_seed(0))
        >>> hidden, state = lm.hidden(torch.tensor([[3, 1, 4]]))
        >>> lm.decoder(hidden).shape
        torch.Size([1, 3, 100])
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        hidden_size: int,
        embedding_size: int,
        input_dropout: float = 0.0,
        state_dropout: float = 0.0,
        output_dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "hidden_size": hidden_size, "embedding_size": embedding_size}
        for name, size in sizes.items():
            require_whole(name, size)
        dropouts = {"input_dropout": input_dropout, "state_dropout": state_dropout, "output_dropout": output_dropout}
        for name, dropout in dropouts.items():
            require_number(name, dropout, low=0.0)
            if dropout >= 1:
                raise SettingError(f"{name} must be in [0, 1), got {dropout}.")
        self.input_dropout, self.state_dropout, self.output_dropout = dropouts.values()
        # Neither of the two ways of making a layer draws random numbers that are thrown away.
        self.lstm = nn.LSTM(embedding_size, hidden_size, device="meta").to_empty(device="cpu")
        layers = [nn.utils.skip_init(nn.Linear, embedding_size, vocabulary)]
        if hidden_size != embedding_size:
            layers.insert(0, nn.utils.skip_init(nn.Linear, hidden_size, embedding_size, bias=False))
        self.decoder = nn.Sequential(*layers)
        self._initialize(generator)

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator | None) -> None:
        lstm = self._weights
        for matrix in (self.output.weight, lstm.ih, lstm.hh):
            deviation = matrix.shape[1] ** -0.5
            nn.init.trunc_normal_(matrix, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator)
        if self.projection is not None:
            nn.init.orthogonal_(self.projection.weight, generator=generator)
        for bias in (self.output.bias, lstm.bias_ih, lstm.bias_hh):
            bias.zero_()
        lstm.bias_ih[self.hidden_size : 2 * self.hidden_size] = 1.0

    @property
    def _weights(self) -> _Weights:
        return _Weights(*self.lstm.all_weights[0])

    @property
    def output(self) -> nn.Linear:
        """The softmax layer. Its weight is the embedding too."""
        return cast("nn.Linear", self.decoder[-1])

    @property
    def projection(self) -> nn.Linear | None:
        """From the LSTM's output to the input of the softmax layer; None where their sizes agree."""
        return cast("nn.Linear", self.decoder[0]) if len(self.decoder) > 1 else None

    @property
    def vocabulary(self) -> int:
        """The number of words."""
        return self.output.out_features

    @property
    def hidden_size(self) -> int:
        """The length of what ``hidden`` returns."""
        return self.lstm.hidden_size

    @property
    def embedding_size(self) -> int:
        """The length of what goes into the softmax layer."""
        return self.output.in_features

    def initial(self, batch: int) -> State:
        """Returns the state at the beginning of ``batch`` texts: zeros."""
        zeros = self._weights.hh.new_zeros(2, batch, self.hidden_size)
        return State(*zeros.unbind())

    def hidden(self, tokens: Int[Tensor, "b t"], state: State | None = None) -> tuple[Float[Tensor, "b t h"], State]:
        """Returns the LSTM's output after each word, and the state after the last; without dropout.

        Gradients go to the weights through these words, but no further back than to ``state``.

        Args:
            tokens: The words of ``b`` texts by number.
            state: As returned for the segment before; the beginning of the texts when None.

        Raises:
            LabelError: If a word's number is not in the vocabulary.
            ShapeError: If there are no words, or the state is that of another number of texts or another model.
            DtypeError, DeviceError: If the words are no whole numbers, or on another device than the model.
        """
        tokens = self._checked("tokens", tokens)
        state = self._started(state, len(tokens))
        words = embedding(tokens.mT, self.output.weight)
        if torch.is_grad_enabled():  # several times as fast as nn.LSTM where there is a gradient to be had
            outputs, state = self._unrolled(words, state, torch.ones_like(state.hidden))
        else:
            outputs, (hidden, cell) = self.lstm(words, (state.hidden.unsqueeze(0), state.cell.unsqueeze(0)))
            state = State(hidden.squeeze(0), cell.squeeze(0))
        return outputs.transpose(0, 1), state

    def inputs(self, hidden: Float[Tensor, "*n h"]) -> Float[Tensor, "*n d"]:
        """Maps what ``hidden`` returns to what goes into the softmax layer."""
        return hidden if self.projection is None else self.projection(hidden)

    def forward(self, tokens: Int[Tensor, "b t"], state: State | None = None) -> tuple[Float[Tensor, "b t c"], State]:
        """Returns the logits of the word after each word, and the state after the last; see ``hidden``."""
        hidden, state = self.hidden(tokens, state)
        return self.decoder(hidden), state

    def loss(
        self,
        tokens: Int[Tensor, "b t"],
        targets: Int[Tensor, "b t"],
        state: State | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], State]:
        """Returns the mean loss in nats per word, with dropout in training mode, and the state without gradient.

        Args:
            tokens: The words.
            targets: The words that come after them.
            state: As returned for the segment before; the beginning of the texts when None.
            generator: Draws the dropout masks; torch's global random state does when None.

        Raises:
            LabelError, ShapeError, DtypeError, DeviceError: As in ``hidden``, for the targets as well.
        """
        tokens, targets = self._checked("tokens", tokens), self._checked("targets", targets)
        if tokens.shape != targets.shape:
            raise ShapeError(f"each word needs a target: got shapes {(*tokens.shape,)} and {(*targets.shape,)}.")
        state = self._started(state, len(tokens))
        words = self._dropped(embedding(tokens.mT, self.output.weight), self.input_dropout, generator)
        mask = self._dropped(torch.ones_like(state.hidden), self.state_dropout, generator)
        outputs, state = self._unrolled(words, state, mask)
        inputs = self.inputs(self._dropped(outputs, self.output_dropout, generator))
        if self.projection is not None:
            inputs = self._dropped(inputs, self.output_dropout, generator)
        softmax = self.output.weight, self.output.bias
        return linear_cross_entropy(inputs.flatten(0, 1), *softmax, targets.mT.flatten()), state

    def _unrolled(self, words: Tensor, state: State, mask: Tensor) -> tuple[Float[Tensor, "t b h"], State]:
        lstm = self._weights
        # Under autocast the product comes in its dtype; what is summed up over the steps is in that of the weights.
        gates = linear(words, lstm.ih).to(lstm.ih.dtype) + (lstm.bias_ih + lstm.bias_hh)
        outputs, cell = unroll(gates, state.hidden, state.cell, lstm.hh, mask)
        return outputs, State(outputs[-1].detach().clone(), cell.detach())  # a view would keep all outputs

    def _dropped(self, values: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
        if not self.training or dropout == 0:
            return values
        kept = torch.empty_like(values).bernoulli_(1 - dropout, generator=generator)
        return values * kept.div_(1 - dropout)

    def _started(self, state: State | None, batch: int) -> State:
        """Returns the state in the dtype of the weights (autocast makes others), or that of the beginning."""
        if state is None:
            return self.initial(batch)
        shapes = [tuple(part.shape) for part in state]
        if shapes != [(batch, self.hidden_size)] * 2:
            raise ShapeError(
                f"the state of {batch} texts must be two tensors of shape {(batch, self.hidden_size)}, got {shapes}. "
                "Is it that of another batch, or of another model?"
            )
        return State(*(part.to(self._weights.hh.dtype) for part in state))

    def _checked(self, name: str, tokens: Tensor) -> Int[Tensor, "b t"]:
        return check_tokens(name, tokens, vocabulary=self.vocabulary, device=self.output.weight.device)
