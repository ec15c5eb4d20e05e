"""Causal language models of transformers under the library's evaluator; all small, and none downloaded."""

import builtins
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recollect import EpisodicMemory, LocalAdaptation, MbPA, Mixture, Parametric, neural_cache, rules
from recollect.data import data_folder, penn_treebank
from recollect.errors import (
    DeviceError,
    DtypeError,
    HeadError,
    LabelError,
    MissingExtraError,
    SettingError,
    ShapeError,
)
from recollect.integrations.transformers import CausalLM
from recollect.language.dynamic import DynamicEvaluation, gradient_statistics
from recollect.language.evaluate import Evaluation, evaluate
from recollect.language.model import LanguageModel
from recollect.language.static import knn_lm, remember
from recollect.language.vocabulary import Vocabulary
from recollect.predictors import Predictor

WORDS = 40
KINDS = ("gpt2", "llama", "llama tied", "mistral")


def model(kind: str, **settings: Any) -> Any:
    """A small model with weights that are large enough for words to matter."""
    import transformers

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if kind.startswith("gpt2"):
        sizes = {"vocab_size": WORDS, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
        config = transformers.GPT2Config(**{**sizes, "initializer_range": 0.3, **ends, **settings})
        return transformers.GPT2Model(config) if kind == "gpt2 without head" else transformers.GPT2LMHeadModel(config)
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    settings = {**sizes, "initializer_range": 0.3, **ends, **settings}
    if kind == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**settings, sliding_window=5))
    if kind == "gemma2":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings))
    if kind == "granite":
        return transformers.GraniteForCausalLM(transformers.GraniteConfig(**settings, logits_scaling=2.0))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, tie_word_embeddings=kind == "llama tied"))


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_gives_the_logits_of_the_model(kind: str) -> None:
    net = model(kind)
    lm = CausalLM(net)
    tokens = text(36).view(2, 18)
    hidden, _ = lm.hidden(tokens)
    assert isinstance(lm, LanguageModel)
    assert (lm.vocabulary, lm.hidden_size, lm.context, lm.stride) == (WORDS, 16, 24, 12)
    assert lm.inputs(hidden) is hidden
    torch.testing.assert_close(lm.decoder(hidden), net.eval()(tokens).logits)
    tied = lm.output.weight is net.get_input_embeddings().weight
    assert tied == (kind in {"gpt2", "llama tied"})
    weights = [weight for _, weight in lm.named_parameters()]
    assert len(weights) == len({id(weight) for weight in weights}) == len(list(net.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("context", "stride"), [(24, None), (8, 3), (8, 1), (8, 8), (1, 1)])
def test_every_word_is_read_in_the_first_window_that_reaches_it(kind: str, context: int, stride: int | None) -> None:
    net = model(kind).double().eval()
    lm = CausalLM(net, context=context, stride=stride)
    tokens = text(50)
    hidden = lm.hidden(tokens[None])[0][0]
    for place in range(len(tokens)):
        start = next(start for start in itertools.count(0, lm.stride) if place < start + context)
        assert start == 0 or context - lm.stride < place + 1 - start <= context
        logits = net(tokens[None, start : place + 1], use_cache=False).logits[0, -1]
        torch.testing.assert_close(lm.decoder(hidden[place]), logits, rtol=1e-5, atol=1e-5)  # norms are in float32


@pytest.mark.parametrize("kind", ["gpt2", "mistral"])
def test_the_block_size_does_not_matter(kind: str) -> None:
    lm = CausalLM(model(kind).double(), context=10, stride=4)
    results = []
    for block in (1, 7, 10, 256):
        memory = EpisodicMemory(capacity=30, key_size=16, key_dtype=torch.float64, history=256)
        adapted = MbPA(
            lm.decoder, memory, neighbors=5, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1, keep_base=True)
        )
        cache = neural_cache(memory, classes=WORDS, flatness=0.1)
        output = Mixture(Parametric(lm.decoder), adapted, cache, weights=(0.6, 0.2, 0.2))
        results.append(evaluate(lm.hidden, output, memory, text(50), block=block, first=0).nats)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_depends_on_those_before_it_alone(kind: str) -> None:
    lm = CausalLM(model(kind).double(), context=10, stride=4)
    one = text(60)
    other = torch.cat([one[:33], text(27, seed=1)])
    losses = [evaluate(lm.hidden, Parametric(lm.decoder), None, tokens, block=7).nats for tokens in (one, other)]
    torch.testing.assert_close(losses[0][:32], losses[1][:32], rtol=0, atol=1e-7)
    assert not torch.allclose(losses[0][33:], losses[1][33:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_state_can_be_gone_on_from_twice(kind: str, grad: bool) -> None:
    lm = CausalLM(model(kind), context=10, stride=4)
    with torch.set_grad_enabled(grad):
        _, state = lm.hidden(text(13)[None])
        ways = [lm.hidden(text(9, seed)[None], state)[0] for seed in (1, 2, 1)]
    assert torch.equal(ways[0], ways[2])
    assert not torch.equal(ways[0], ways[1])
    assert ways[0].requires_grad == grad


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_words_of_the_call(kind: str) -> None:
    net = model(kind)
    lm = CausalLM(net, context=24)
    tokens, names = text(20), [name for name, _ in lm.named_parameters()]
    weights = [weight for _, weight in lm.named_parameters()]
    hidden, state = lm.hidden(tokens[None, :12])
    whole = cross_entropy(net.eval()(tokens[None, :12]).logits[0], tokens[1:13])
    own = torch.autograd.grad(cross_entropy(lm.decoder(hidden[0]), tokens[1:13]), weights)
    for name, mine, theirs in zip(names, own, torch.autograd.grad(whole, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)
    hidden, _ = lm.hidden(tokens[None, 12:19], state)  # the graph before is gone, and not missed
    torch.autograd.grad(cross_entropy(lm.decoder(hidden[0]), tokens[13:20]), weights)


def test_the_mode_is_that_of_evaluation_and_put_back() -> None:
    net = model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    net.train()
    net.transformer.h[0].eval()
    modes = [module.training for module in net.modules()]
    lm = CausalLM(net)
    state = torch.get_rng_state()
    one, _ = lm.hidden(text(10)[None])
    assert torch.equal(one, lm.hidden(text(10)[None])[0])
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    net.transformer.wte.weight.requires_grad_(False)
    assert "transformer.wte.weight" not in dict(lm.named_parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_dynamic_evaluation_learns_and_puts_the_weights_back(kind: str) -> None:
    net = model(kind, initializer_range=0.05)
    lm = CausalLM(net, context=16)
    train, test = text(400) % 7, text(300, seed=1) % 7  # few of the words that the model has: easily learned
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    statistics = gradient_statistics(lm, train, batch=4)
    alone = evaluate(lm.hidden, Parametric(lm.decoder), None, test)
    with DynamicEvaluation(lm, statistics, rate=1e-3) as dynamic:
        result = evaluate(dynamic.hidden, Parametric(lm.decoder), None, test, block=5, after=dynamic.learn)
        assert not torch.equal(lm.output.weight, before["lm_head.weight"])
    assert result.loss < alone.loss - 0.3
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_knn_lm_is_its_formula(kind: str) -> None:
    net = model(kind).double()
    lm = CausalLM(net)
    train, test, neighbors, temperature, share = text(24), text(20, seed=1), 6, 30.0, 0.25
    memory = EpisodicMemory(capacity=100, key_size=16, key_dtype=torch.float64)
    assert remember(lm.hidden, memory, train, block=5) == 23
    knn = knn_lm(memory, classes=WORDS, neighbors=neighbors, temperature=temperature)
    result = evaluate(lm.hidden, Mixture(Parametric(lm.decoder), knn, weights=(1 - share, share)), None, test)
    with torch.no_grad():
        keys, queries = (net.eval().base_model(words[None]).last_hidden_state[0, :-1] for words in (train, test))
        model_chances = net(test[None]).logits[0, :-1].softmax(-1).gather(1, test[1:, None]).squeeze(1)
    near = (queries[:, None] - keys).square().sum(-1).topk(neighbors, largest=False)
    weights = (-near.values / temperature).exp()
    right = train[1:][near.indices] == test[1:, None]
    votes = (weights * right).sum(1) / weights.sum(1)
    torch.testing.assert_close(result.nats, -((1 - share) * model_chances + share * votes).log(), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def treebank() -> tuple[Vocabulary, dict[str, Tensor]]:
    folder = data_folder()
    if folder is None or not (folder / "ptb" / "ptb.train.txt").is_file():
        pytest.skip("the Penn Treebank is not at hand: set RECOLLECT_DATA to the folder that holds ptb/")
    files = penn_treebank()
    vocabulary = Vocabulary.build(files.train, max_size=2000)
    return vocabulary, {part: vocabulary.encode(file) for part, file in files._asdict().items()}


@pytest.fixture(scope="module")
def trained(treebank: tuple[Vocabulary, dict[str, Tensor]]) -> CausalLM:
    """A GPT-2 with two small layers after some ten seconds of training."""
    vocabulary, texts = treebank
    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocabulary), "n_positions": 32, "n_embd": 64, "n_head": 4, "initializer_range": 0.05}
    net = model("gpt2", **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    steps, batch, length = 200, 32, 32
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(texts["train"]) - length, (batch, 1), generator=generator)
        words = texts["train"][starts + torch.arange(length + 1)]
        loss = cross_entropy(net(words[:, :-1]).logits.flatten(0, 1), words[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return CausalLM(net)


def predictors(lm: CausalLM, memory: EpisodicMemory) -> tuple[Predictor, ...]:
    adaptation = LocalAdaptation(rules.sgd(0.1), steps=1, keep_base=True)
    adapted = MbPA(lm.decoder, memory, neighbors=128, adaptation=adaptation)
    return Parametric(lm.decoder), adapted, neural_cache(memory, classes=lm.vocabulary, flatness=0.2)


def score(lm: CausalLM, output: Predictor, memory: EpisodicMemory, tokens: Tensor, words: Vocabulary) -> Evaluation:
    memory.clear()
    return evaluate(lm.hidden, output, memory, tokens, first=words.end)


def test_memory_lowers_the_perplexity_of_real_text(
    treebank: tuple[Vocabulary, dict[str, Tensor]], trained: CausalLM
) -> None:
    lm, (vocabulary, texts) = trained, treebank
    valid, test = texts["valid"][:3000], texts["test"][:3000]
    memory = EpisodicMemory(capacity=2000, key_size=lm.hidden_size, history=256)
    parts = predictors(lm, memory)
    # What each part gives to each word of the validation text is all that the weights are chosen by.
    chances = torch.stack([-score(lm, part, memory, valid, vocabulary).nats for part in parts], 1).exp()
    choices = [(1 - a - b, a, b) for a in (0.0, 0.1, 0.2, 0.4) for b in (0.0, 0.05, 0.1, 0.2)]
    best = min(choices, key=lambda weights: -float((chances @ chances.new_tensor(weights)).log().mean()))
    assert best[1] > 0
    assert best[2] > 0
    alone = score(lm, parts[0], memory, test, vocabulary)
    mixed = score(lm, Mixture(*parts, weights=best), memory, test, vocabulary)
    shares = vocabulary.counts / vocabulary.counts.sum()
    assert alone.loss < -shares.log()[test].mean() - 0.1  # it has learned more than how often each word comes
    assert mixed.loss < alone.loss - 0.03


def test_what_is_no_causal_language_model_is_refused(untyped: None) -> None:
    with pytest.raises(SettingError, match=r"model must be one of transformers, .*, got Linear"):
        CausalLM(nn.Linear(3, 3))
    with pytest.raises(HeadError, match="GPT2Model is no decoder with a linear output embedding"):
        CausalLM(model("gpt2 without head"))


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_logits_that_do_not_follow_from_the_head_are_refused(kind: str) -> None:
    with pytest.raises(HeadError, match="ForCausalLM are not those of its output embedding: it has a soft cap"):
        CausalLM(model(kind))


def test_a_model_that_looks_ahead_is_refused() -> None:
    import transformers

    sizes = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

    class Bidirectional(transformers.BertPreTrainedModel):
        def __init__(self) -> None:
            super().__init__(transformers.BertConfig(**sizes, intermediate_size=24, initializer_range=0.3))
            self.bert = transformers.BertModel(self.config)
            self.head = nn.Linear(16, WORDS)

        def get_output_embeddings(self) -> nn.Linear:
            return self.head

        def forward(self, input_ids: Tensor, use_cache: bool, return_dict: bool) -> Any:
            hidden = self.bert(input_ids).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=self.head(hidden))

    with pytest.raises(HeadError, match="Bidirectional reads words otherwise in two segments than at once"):
        CausalLM(Bidirectional())


def test_a_model_that_takes_no_cache_is_refused() -> None:
    import transformers

    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=1)
    )
    with pytest.raises(HeadError, match=r"MambaForCausalLM cannot be run as|MambaForCausalLM reads words otherwise"):
        CausalLM(mamba, context=16)


def test_bad_settings_are_refused(untyped: None) -> None:
    import transformers

    net = model("gpt2")
    with pytest.raises(SettingError, match="this model has 24 positions, which is too few for context=25"):
        CausalLM(net, context=25)
    with pytest.raises(SettingError, match="context must be a whole number above 0, got 0"):
        CausalLM(net, context=0)
    for stride in (0, 9, True):
        with pytest.raises(SettingError, match="stride must be a whole number from 1 to the context of 8"):
            CausalLM(net, context=8, stride=stride)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.raises(SettingError, match="BloomForCausalLM has positions without end: say how many"):
        CausalLM(bloom)
    assert CausalLM(bloom, context=16).context == 16


def test_a_padded_head_has_no_words_of_its_own() -> None:
    """Heads are padded to sizes that suit GPUs: what has no embedding is no word."""
    net = model("llama")
    net.lm_head = torch.nn.Linear(16, WORDS + 24, bias=False)
    lm = CausalLM(net)
    assert lm.hidden(torch.tensor([[WORDS - 1]]))[0].shape == (1, 1, 16)
    with pytest.raises(LabelError, match=f"words are numbered from 0 to {WORDS - 1} in this model, got {WORDS}"):
        lm.hidden(torch.tensor([[WORDS]]))


def test_bad_words_are_refused(untyped: None) -> None:
    lm = CausalLM(model("gpt2"))
    for word in (WORDS, -1):
        with pytest.raises(LabelError, match=f"words are numbered from 0 to {WORDS - 1} in this model, got {word}"):
            lm.hidden(torch.tensor([[3, word]]))
    with pytest.raises(ShapeError, match=r"tokens must have shape \(texts, words\)"):
        lm.hidden(text(5))
    with pytest.raises(ShapeError, match="with at least one word"):
        lm.hidden(text(0)[None])
    with pytest.raises(DtypeError, match="tokens must be whole numbers"):
        lm.hidden(torch.zeros(1, 2))
    with pytest.raises(DtypeError, match="tokens must be a tensor"):
        lm.hidden([[1]])
    with pytest.raises(DeviceError, match="tokens are on meta"):
        lm.hidden(torch.zeros(1, 2, dtype=torch.long, device="meta"))
    _, state = lm.hidden(text(6).view(2, 3))
    with pytest.raises(ShapeError, match="the state is that of 2 texts, but there are words of 1"):
        lm.hidden(text(3)[None], state)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'recollect\[transformers\]'"):
        CausalLM(nn.Linear(3, 3))
