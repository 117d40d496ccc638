"""Decoding against transformers' ``generate(inputs_embeds=…)``: the same tokens and scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from adacm2_jax.config import LlamaConfig, tiny
from adacm2_jax.inference.generate import Generated, GenerationConfig, generate, nucleus, search
from adacm2_jax.models.adacm2 import AdaCM2, Question
from adacm2_jax.models.llama import Llama, init_cache
from tests.parity import names, oracle

LLM = LlamaConfig(
    vocab_size=40, width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_width=64, max_positions=64
)
EOS, PAD, LONGEST = 2, 1, 12
#: Seven models with thirty prompts each: 210 pairs in every case.
SEEDS = range(7)
#: Places of visual tokens, then words of each row's prompt; the padding stands between them.
VISUAL, WORDS = 3, np.tile([8, 5, 1, 8, 3, 6], 5)
#: Of scores: errors of the logits (their magnitude is 5), and a dozen roundings by 6e-8 each.
ABSOLUTE, RELATIVE = 1e-5, 1e-6
#: Of all answers in a case, how many may be the other one of two that tie.
MOST_TIES = 0.01

LAVIS = dict(num_beams=5, repetition_penalty=1.5, num_return=5)
CASES = {
    "greedy": dict(),
    "greedy, penalised": dict(repetition_penalty=1.5),
    "greedy, at least five": dict(min_new_tokens=5, repetition_penalty=0.8),
    "greedy, eos allowed at once": dict(min_new_tokens=0, eos_ids=(EOS, 5, 9, 30)),
    "beams, length penalty -1": dict(**LAVIS, length_penalty=-1.0),
    "beams, length penalty 0": dict(**LAVIS, length_penalty=0.0),
    "beams, length penalty 1": dict(**LAVIS, length_penalty=1.0),
    "beams, at least four": dict(**LAVIS, min_new_tokens=4, max_new_tokens=7),
    "beams, exactly six": dict(num_beams=3, num_return=2, min_new_tokens=6, max_new_tokens=6),
    "beams, one token": dict(**LAVIS, min_new_tokens=0, max_new_tokens=1),
    "beams, four end tokens": dict(**LAVIS, min_new_tokens=0, eos_ids=(EOS, 5, 9, 30)),
    "beams, no end token, unpenalised": dict(num_beams=4, num_return=4, eos_ids=()),
}


def make_config(**fields) -> GenerationConfig:
    return GenerationConfig(**(dict(max_new_tokens=LONGEST, eos_ids=(EOS,), pad_id=PAD) | fields))


def build(seed: int):
    """A random model whose end token is likely enough to come at all lengths."""
    model = oracle.llama(LLM, seed)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2
    model.generation_config = transformers.GenerationConfig()
    return model, names.llama(model.state_dict(), LLM)


def prompts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [30, 11, W] and mask, as AdaCM² lays them out: visual tokens, padding, words."""
    places = VISUAL + WORDS.max()
    embeddings = np.random.default_rng(seed).normal(size=(len(WORDS), places, LLM.width))
    place = np.arange(places)
    mask = (place < VISUAL) | (place >= places - WORDS[:, None])
    return embeddings.astype(np.float32), mask


MODEL = Llama(LLM)


def run(params, embeddings, mask, positions, cache):
    hidden, cache = MODEL.apply({"params": params}, embeddings, mask, positions, cache)
    return MODEL.apply({"params": params}, hidden[:, -1], method="logits"), cache


@jax.jit
def prefill(params, embeddings, mask):
    batch, places = mask.shape
    # Room for the longest answer, whatever the case: so it is compiled once for all of them.
    cache = init_cache(LLM, batch, places + LONGEST - 1, jnp.float32)
    return run(params, embeddings, mask, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0), cache)


@functools.partial(jax.jit, static_argnames="config")
def search_llama(params, logits, cache, config: GenerationConfig) -> Generated:
    def decode(ids, cache):
        embedded = MODEL.apply({"params": params}, ids[:, None], jnp.float32, method="embed")
        positions = cache.tokens[:, None]
        return run(params, embedded, jnp.ones((len(ids), 1), bool), positions, cache)

    return search(logits, cache, decode, config)


def answer(params, embeddings, mask, config: GenerationConfig) -> Generated:
    return search_llama(params, *prefill(params, embeddings, mask), config)


def expect(model, embeddings, mask, config: GenerationConfig) -> Generated:
    """What transformers answers, in our form."""
    output = model.generate(
        inputs_embeds=torch.from_numpy(np.array(embeddings)),
        attention_mask=torch.from_numpy(np.array(mask)).long(),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            min_new_tokens=config.min_new_tokens,
            num_beams=config.num_beams,
            num_return_sequences=config.num_return,
            length_penalty=float(config.length_penalty),
            repetition_penalty=float(config.repetition_penalty),
            do_sample=False,
            early_stopping=False,
            eos_token_id=list(config.eos_ids) or None,
            pad_token_id=config.pad_id,
            return_dict_in_generate=True,
            output_scores=True,
        ),
    )
    found = output.sequences.numpy()
    rows, longest = found.shape
    if config.num_beams > 1:
        lengths = (output.beam_indices.numpy() >= 0).sum(axis=1)
        scores = output.sequences_scores.numpy()
    else:
        ended = np.isin(found, config.eos_ids)
        lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, longest)
        log_probs = model.compute_transition_scores(
            output.sequences, output.scores, normalize_logits=True
        )
        written = np.arange(longest) < lengths[:, None]
        scores = np.where(written, log_probs.numpy(), 0).sum(1) / lengths**config.length_penalty
    ids = np.full((rows, config.max_new_tokens), config.pad_id)
    ids[:, :longest] = np.where(np.arange(longest) < lengths[:, None], found, config.pad_id)
    shape = (rows // config.num_return, config.num_return)
    return Generated(ids.reshape(*shape, -1), lengths.reshape(shape), scores.reshape(shape))


def own_score(model, embeddings, mask, ids, config: GenerationConfig) -> float:
    """What transformers' model gives one answer to one prompt, summed but not divided."""
    ids = torch.from_numpy(np.array(ids)).long()
    words = model.get_input_embeddings()(ids[:-1])
    mask = torch.cat([torch.from_numpy(mask).long(), torch.ones(len(words), dtype=torch.long)])
    logits = model(
        inputs_embeds=torch.cat([torch.from_numpy(embeddings), words])[None],
        attention_mask=mask[None],
        position_ids=(mask.cumsum(0) - 1).clamp(min=0)[None],
    ).logits[0, -len(ids) :]
    scores = logits.log_softmax(-1) if config.num_beams > 1 else logits
    penalty = transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
    scores = torch.stack([penalty(ids[None, :t], row[None])[0] for t, row in enumerate(scores)])
    if config.num_beams == 1:
        scores = scores.log_softmax(-1)
    return float(scores.gather(1, ids[:, None]).sum())


def count_ties(model, embeddings, mask, ours: Generated, theirs: Generated, config) -> int:
    """Fails unless both answer alike, but for answers that tie; returns how many those are.

    Two answers tie if the oracle itself scores them within the rounding of a score: of a greedy
    answer up to where they part, as a tie there changes all that follows.
    """
    ours, theirs = (jax.tree.map(np.asarray, answers) for answers in (ours, theirs))
    ties = (ours.ids != theirs.ids).any(-1)
    for row, rank in np.argwhere(ties):
        scores = []
        parted = int(np.argmax(ours.ids[row, rank] != theirs.ids[row, rank])) + 1
        for answers in (ours, theirs):
            length = int(answers.lengths[row, rank])
            length, norm = (parted, 1) if config.num_beams == 1 else (length, length)
            ids = answers.ids[row, rank, :length]
            score = own_score(model, embeddings[row], mask[row], ids, config)
            scores.append(score / norm**config.length_penalty)
        bound = ABSOLUTE + RELATIVE * abs(scores[1])
        assert abs(scores[0] - scores[1]) <= bound, (
            f"row {row}, rank {rank}: {ours.ids[row, rank]}, the oracle says "
            f"{theirs.ids[row, rank]}; it scores them {scores[0]} and {scores[1]}"
        )
    np.testing.assert_array_equal(ours.lengths[~ties], theirs.lengths[~ties])
    np.testing.assert_allclose(
        ours.scores[~ties], theirs.scores[~ties], rtol=RELATIVE, atol=ABSOLUTE
    )
    return int(ties.sum())


def assert_same(ours: Generated, theirs: Generated) -> None:
    """No allowance is made for ties: in these few no two candidates come within rounding."""
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=RELATIVE, atol=ABSOLUTE)


# That the penalty leaves the prompt alone is what we want, and what transformers warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")


@pytest.fixture(scope="module")
def models():
    return [build(seed) for seed in SEEDS]


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_scores_are_those_of_transformers(models, case):
    config = make_config(**CASES[case])
    lengths, ties = [], 0
    for seed, (model, params) in zip(SEEDS, models, strict=True):
        embeddings, mask = prompts(seed)
        ours = answer(params, embeddings, mask, config)
        theirs = expect(model, embeddings, mask, config)
        ties += count_ties(model, embeddings, mask, ours, theirs, config)
        lengths.extend(np.asarray(ours.lengths).ravel())
    print(f"{len(SEEDS) * len(WORDS)} pairs, {len(lengths)} answers, {ties} of them ties")
    assert ties <= MOST_TIES * len(lengths)
    if config.eos_ids and config.min_new_tokens < config.max_new_tokens > 1:
        assert len(set(lengths)) > 2, "the models must end their answers at many lengths"


@pytest.mark.parametrize("case", ["greedy, penalised", "beams, length penalty 1"])
def test_only_a_tie_excuses_another_answer(case):
    """Two words that the model cannot tell apart may stand for each other, other words may not."""
    config = make_config(**CASES[case])
    model, _ = build(seed=0)
    embeddings, mask = (values[:1] for values in prompts(seed=0))
    theirs = expect(model, embeddings, mask, config)
    used = next(word for word in theirs.ids[0, 0] if word > EOS)
    twin, other = [word for word in range(EOS + 1, LLM.vocab_size) if word not in theirs.ids][:2]
    with torch.no_grad():
        for table in (model.lm_head.weight, model.model.embed_tokens.weight):
            table[twin] = table[used]

    def replaced(word: int) -> Generated:
        return theirs.replace(ids=np.where(theirs.ids == used, word, theirs.ids))

    changed = int((theirs.ids == used).any(-1).sum())
    assert count_ties(model, embeddings, mask, replaced(twin), theirs, config) == changed
    with pytest.raises(AssertionError, match="the oracle says"):
        count_ties(model, embeddings, mask, replaced(other), theirs, config)


def test_padding_before_everything_changes_nothing(models):
    """Each row against transformers on that row alone, without its padding.

    A padded batch would be no oracle: with ``inputs_embeds`` transformers 5.23 takes the number of
    leading padded places for generated tokens that the repetition penalty must ignore.
    """
    config = make_config(**CASES["beams, length penalty 1"])
    for seed, (model, params) in list(zip(SEEDS, models, strict=True))[:4]:
        embeddings, _ = prompts(seed)
        lengths = VISUAL + WORDS
        mask = np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
        ours = answer(params, embeddings, mask, config)
        for row, length in enumerate(lengths[:6]):
            alone = embeddings[row : row + 1, -length:], mask[row : row + 1, -length:]
            theirs = expect(model, *alone, config)
            assert_same(jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], ours), theirs)


def test_the_whole_model_answers_as_its_language_model_would(models):
    """:func:`generate`: projected queries, then the prompt, through AdaCM²'s own methods."""
    oracle_model, params = models[0]
    model = AdaCM2(tiny(llm=LLM, max_text_len=8))
    rng = np.random.default_rng(5)
    width, batch = model.config.qformer.width, len(WORDS)
    projection = rng.normal(size=(width, LLM.width)).astype(np.float32) * width**-0.5
    params = dict(
        llm=params,
        language_projection=dict(kernel=projection, bias=np.zeros(LLM.width, np.float32)),
        temporal_embed=np.zeros(
            (model.config.temporal_positions, model.config.vision.width), np.float32
        ),
    )
    queries = rng.normal(size=(batch, model.config.qformer.num_queries, width)).astype(np.float32)
    ids = rng.integers(LLM.vocab_size, size=(batch, WORDS.max()))
    mask = np.arange(WORDS.max()) >= WORDS.max() - WORDS[:, None]
    config = make_config(**CASES["beams, length penalty 1"])
    ours = jax.jit(generate, static_argnums=(0, 4))(
        model, params, queries, Question(ids, mask, ids, mask), config
    )
    words = oracle_model.get_input_embeddings()(torch.from_numpy(ids)).numpy()
    embeddings = np.concatenate([queries @ projection, words], axis=1)
    mask = np.concatenate([np.ones(queries.shape[:2], bool), mask], axis=1)
    assert_same(ours, expect(oracle_model, embeddings, mask, config))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_tokens_that_transformers_keeps(top_p):
    logits = np.random.default_rng(0).normal(scale=2, size=(200, 50)).astype(np.float32)
    theirs = transformers.TopPLogitsWarper(top_p)(None, torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(nucleus(jnp.asarray(logits), top_p), theirs)
