"""Which method runs when, and that prompts in pieces and in batches are what they are alone."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dsmoe.decoder import Decoder
from lightning_dsmoe.inference import compile_sparse
from lightning_dsmoe.inference.engine import engine as engine_module
from lightning_dsmoe.inference.engine.cache import DecoderCache
from lightning_dsmoe.inference.engine.decode.compiled_step import CannotCompile, NotReady
from lightning_dsmoe.inference.engine.engine import Engine
from lightning_dsmoe.inference.engine.switch_points import SwitchPoints
from lightning_dsmoe.routing import (
    AllExperts,
    Selection,
    SelectionPlan,
    Threshold,
    ThresholdTopK,
    TopK,
    TopP,
)

from ...pairwise import pairwise
from .conftest import (
    SELECTIONS,
    Steps,
    V,
    assert_near,
    learned_positions_glu,
    packed,
    rotary_mlp,
    token_by_token,
    uniform,
    without_routers,
)

UNCOMPILED = SwitchPoints(gather_up_to=0)
# ThresholdTopK counts over all tokens of a call, so it may choose others for another batch.
OF_ONE_TOKEN = [AllExperts(), TopK(1), TopK(2, renormalize=True), Threshold(0.8), TopP(0.6)]


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what the decoder is run on."""
    seen = []
    forward_tokens = engine_module.forward_tokens

    def recorded(decoder: Decoder, tokens_BT: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(tokens_BT.shape[1])
        return forward_tokens(decoder, tokens_BT, *args, **options)

    monkeypatch.setattr(engine_module, "forward_tokens", recorded)
    return seen


@pytest.mark.parametrize(
    ("chosen", "padded", "chunk", "make_decoder"),
    pairwise(
        chosen=OF_ONE_TOKEN,
        padded=[False, True],
        chunk=[1, 3, 5, 13],
        make_decoder=[rotary_mlp, learned_positions_glu, without_routers],
    ),
)
@torch.no_grad()
def test_a_prompt_in_pieces_is_the_prompt_at_once(
    chosen: Selection,
    padded: bool,
    chunk: int,
    decoder: Decoder,
    tokens: Tensor,
    mask: Tensor,
    lengths: list[int],
) -> None:
    engine, some = Engine(packed(decoder), UNCOMPILED), mask if padded else None
    whole = engine.open(3, 14, uniform(chosen)).read(tokens, some)
    assert lengths == [14]
    engine.max_tokens = 3 * chunk + 2
    pieces = engine.open(3, 14, uniform(chosen))
    actual = pieces.read(tokens, some)
    assert lengths[1:] == [chunk] * (14 // chunk) + ([14 % chunk] if 14 % chunk else [])
    assert pieces.length == 14
    assert_near(actual, whole)
    assert_near(actual, decoder(tokens, uniform(chosen), mask=some).logits[:, -1])


def test_more_sequences_than_a_chunk_holds(
    one_decoder: Decoder, tokens: Tensor, lengths: list[int]
) -> None:
    engine = Engine(packed(one_decoder), UNCOMPILED, max_tokens=2)
    engine.open(3, 4, uniform(TopK(1))).read(tokens[:, :4])
    assert lengths == [1] * 4


@pytest.mark.parametrize("chosen", OF_ONE_TOKEN, ids=str)
@torch.no_grad()
def test_a_prompt_is_independent_of_its_batch(
    chosen: Selection, decoder: Decoder, tokens: Tensor, mask: Tensor
) -> None:
    engine, plan = Engine(packed(decoder), UNCOMPILED), uniform(chosen)
    together = engine.open(3, 14, plan)
    for part, some in ((slice(9), mask[:, :9]), *((slice(n, n + 1), None) for n in range(9, 14))):
        logits = together.read(tokens[:, part], some)
        for row, start in enumerate((0, 5, 8)):
            alone = engine.open(1, 14, plan).read(tokens[row : row + 1, start : part.stop])
            assert_near(logits[row : row + 1], alone)


@pytest.mark.parametrize(
    ("selection", "batch", "make_decoder"),
    pairwise(
        selection=SELECTIONS,
        batch=[1, 3],
        make_decoder=[rotary_mlp, learned_positions_glu, without_routers],
    ),
)
@torch.no_grad()
def test_reading_is_that_of_the_plain_decoder(
    batch: int, selection: Selection, decoder: Decoder, tokens: Tensor
) -> None:
    plan, caches = uniform(selection), decoder.new_caches(batch, 14)
    context = Engine(packed(decoder), UNCOMPILED).open(batch, 14, plan)
    for part in tokens[:batch].split((6, 1, 1, 3, 1, 1, 1), dim=1):
        expected = decoder(part, plan, caches=caches).logits[:, -1]
        assert_near(context.read(part), expected)
        assert context.length == caches[0].length


class FakeStep:
    """Stands in for a compiled step; its logits say which token it was given."""

    compilations: list[tuple[SelectionPlan, int]]

    def __init__(
        self, decoder: Decoder, plan: SelectionPlan, n_sequences: int, **options: Any
    ) -> None:
        self.compilations.append((plan, n_sequences))
        self.n_sequences = n_sequences

    def __call__(self, tokens_T: Tensor, cache: DecoderCache) -> Tensor:
        cache.next_slots()
        return torch.nn.functional.one_hot(tokens_T, V) * 100.0


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SelectionPlan, int]]:
    monkeypatch.setattr(FakeStep, "compilations", [], raising=False)
    monkeypatch.setattr(engine_module, "CompiledStep", FakeStep)
    return FakeStep.compilations


def uncompiled_steps(made: list[int]) -> Any:
    """Stands in for `CompiledStep`: the parts of a step run uncompiled."""

    def uncompiled_step(
        decoder: Decoder, plan: SelectionPlan, n_sequences: int, **options: Any
    ) -> Steps:
        made.append(n_sequences)
        steps = Steps(decoder, plan)
        steps.n_sequences = n_sequences
        return steps

    return uncompiled_step


def decoded(engine: Engine, plan: SelectionPlan, batch: int) -> bool:
    """Whether a token after a prompt goes through the compiled step."""
    context = engine.open(batch, 8, plan)
    context.read(torch.zeros(batch, 3, dtype=torch.long))
    new = torch.arange(batch)[:, None] % V
    return torch.equal(context.read(new).amax(1), torch.full((batch,), 100.0))


@pytest.mark.parametrize("most", [0, 1, 3, 8])
def test_up_to_the_first_switch_point_the_step_is_compiled(
    most: int, one_decoder: Decoder, compilations: list[tuple[SelectionPlan, int]]
) -> None:
    engine, plan = Engine(packed(one_decoder), SwitchPoints(gather_up_to=most)), uniform(TopK(1))
    for batch in (1, 3, 8, 9):
        assert decoded(engine, plan, batch) == (batch <= most)
    assert compilations == [(plan, size) for n, size in ((1, 1), (3, 4), (8, 8)) if n <= most]


def test_a_step_is_compiled_once_for_each_plan_and_number_of_sequences(
    one_decoder: Decoder, compilations: list[tuple[SelectionPlan, int]]
) -> None:
    engine = Engine(packed(one_decoder), SwitchPoints())
    plans = [uniform(TopK(1)), uniform(TopK(2)), uniform(TopK(1))]
    for plan in plans:
        for batch in (2, 1, 2):
            assert decoded(engine, plan, batch)
    assert compilations == [(plan, batch) for plan in plans[:2] for batch in (2, 1)]


def test_only_single_tokens_after_others_go_through_the_step(
    one_decoder: Decoder, compilations: list[tuple[SelectionPlan, int]]
) -> None:
    context = Engine(packed(one_decoder), SwitchPoints()).open(2, 9, uniform(TopK(1)))
    one = torch.zeros(2, 1, dtype=torch.long)
    context.read(one)
    context.read(one.expand(2, 2))
    context.read(one, torch.ones(2, 1, dtype=torch.bool))
    assert not compilations
    context.read(one)
    assert len(compilations) == 1
    assert context.length == 5


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [1]), (16, [16]), (17, [1, 16]), (31, [8, 16]), (40, [8, 16])]
)
@torch.no_grad()
def test_many_sequences_decode_in_groups(
    batch: int, sizes: list[int], one_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations: list[int] = []
    monkeypatch.setattr(engine_module, "CompiledStep", uncompiled_steps(compilations))
    tokens, plan = torch.randint(V, (batch, 8)), uniform(TopK(2))
    mask = torch.arange(5) >= torch.randint(4, (batch, 1))
    caches = one_decoder.new_caches(batch, 8)
    context = Engine(packed(one_decoder), SwitchPoints(gather_up_to=48)).open(batch, 8, plan)
    for part, some in ((slice(5), mask), *((slice(n, n + 1), None) for n in range(5, 8))):
        expected = one_decoder(tokens[:, part], plan, mask=some, caches=caches).logits[:, -1]
        assert_near(context.read(tokens[:, part], some), expected)
    assert context.length == 8
    assert sorted(compilations) == sizes


PADDED = pairwise(
    chosen=[AllExperts(), TopK(2), Threshold(0.8, renormalize=True), TopP(0.6), ThresholdTopK(0.8)],
    n_sequences=range(1, 17),
    int8=[False, True],
    make_decoder=[rotary_mlp, learned_positions_glu],
)


@pytest.mark.parametrize(("chosen", "n_sequences", "int8", "make_decoder"), PADDED)
@torch.no_grad()
def test_sequences_that_fill_a_step_up_change_nothing(
    chosen: Selection,
    n_sequences: int,
    int8: bool,
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    monkeypatch.setattr(engine_module, "CompiledStep", uncompiled_steps(made))
    tokens, plan = torch.randint(V, (n_sequences, 14)), uniform(chosen)
    mask = torch.arange(5) >= torch.randint(5, (n_sequences, 1))
    mask[0] = True
    twin = packed(decoder, int8=int8)
    caches = twin.new_caches(n_sequences, 14)
    reader = Engine(twin, SwitchPoints()).open(n_sequences, 14, plan)
    # Several tokens at once, after single ones, are read uncompiled.
    for length, some in ((5, mask), (1, None), (1, None), (2, None), (1, None)):
        part = tokens[:, reader.length : reader.length + length]
        expected = twin(part, plan, mask=some, caches=caches).logits[:, -1]
        found = reader.read(part, some)
        assert_near(found, expected, 4e-6)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
    groups = [n_sequences]
    if not isinstance(chosen, ThresholdTopK):
        groups = [8, n_sequences - 8] if 8 < n_sequences < 16 else groups
        groups = [next(size for size in (1, 2, 4, 8, 16) if size >= n) for n in groups]
    assert made == list(dict.fromkeys(groups))


class Own(TopK):
    """May look at all tokens, for all that is known."""


def test_a_selection_of_somebody_elses_is_not_filled_up(
    one_decoder: Decoder, compilations: list[tuple[SelectionPlan, int]]
) -> None:
    plan = SelectionPlan(TopK(2), layers={"blocks.1.attention": Own(1)})
    assert decoded(Engine(packed(one_decoder), SwitchPoints()), plan, 3)
    assert compilations == [(plan, 3)]


@torch.no_grad()
def test_a_larger_step_serves_until_that_of_the_size_is_there(
    one_decoder: Decoder, tokens: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    used, ready = [], {16}
    whole = uncompiled_steps(made)

    def step(decoder: Decoder, plan: SelectionPlan, n_sequences: int, **options: Any) -> Any:
        if n_sequences not in ready:
            raise NotReady
        run = whole(decoder, plan, n_sequences)

        def noted(tokens_B: Tensor, cache: DecoderCache) -> Tensor:
            used.append(n_sequences)
            assert len(tokens_B) == cache.n_rows == n_sequences
            logits: Tensor = run(tokens_B, cache)
            return logits

        noted.n_sequences = n_sequences  # type: ignore[attr-defined]
        return noted

    monkeypatch.setattr(engine_module, "CompiledStep", step)
    engine, plan = Engine(packed(one_decoder), SwitchPoints()), uniform(Threshold(0.8))
    expected = token_by_token(one_decoder, plan, tokens, 9, mask)
    reader = engine.open(3, 14, plan)
    reader.read(tokens[:, :9], mask[:, :9])
    for at, more in zip(range(9, 14), ([], [16], [], [8], [4]), strict=True):
        for size in more:
            ready.add(size)
            engine.compiled_step(plan, size)
        assert_near(reader.read(tokens[:, at : at + 1]), expected[:, at])
    assert used == [16, 16, 8, 4]
    assert made == [16, 8, 4]


JOINED = pairwise(
    chosen=OF_ONE_TOKEN,
    compiled=[False, True],
    make_decoder=[rotary_mlp, learned_positions_glu, without_routers],
)


@pytest.mark.parametrize(("chosen", "compiled", "make_decoder"), JOINED)
@torch.no_grad()
def test_sequences_come_and_go(
    chosen: Selection, compiled: bool, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "CompiledStep", uncompiled_steps([]))
    plan, lengths = uniform(chosen), (2, 7, 4)
    points = SwitchPoints(gather_up_to=16 if compiled else 0)
    engine = Engine(packed(decoder), points)
    texts = torch.randint(V, (5, 14))
    alone = token_by_token(decoder, plan, texts, 0)
    at = [*lengths, 3, 3]  # tokens read of each
    mask = torch.arange(7) >= 7 - torch.tensor(lengths)[:, None]
    prompts = torch.stack(
        [torch.cat([t.new_zeros(7 - n), t[:n]]) for t, n in zip(texts, lengths, strict=False)]
    )
    reader = engine.open(3, 9, plan)
    running = [0, 1, 2]

    def check(logits: Tensor) -> None:
        for row, text in enumerate(running):
            assert_near(logits[row], alone[text, at[text] - 1])

    def go_on(steps: int) -> None:
        for _ in range(steps):
            new = torch.stack([texts[text, at[text]] for text in running])[:, None]
            for text in running:
                at[text] += 1
            check(reader.read(new))

    check(reader.read(prompts, mask))
    go_on(2)
    reader.keep([2, 0])  # the longest leaves
    running = [2, 0]
    go_on(0)
    other = engine.open(2, 3, plan)
    other.read(texts[3:, :3])
    reader = engine.join([reader, other], 5)
    running = [2, 0, 3, 4]
    assert reader.length == 6  # of the longest that is left
    go_on(5)
    with pytest.raises(ValueError, match="do not fit a cache of 11"):
        reader.read(texts[:4, :1])
    reader.keep([3])
    running = [4]
    last = engine.open(1, 1, plan)
    with pytest.raises(ValueError, match="has read nothing"):
        engine.join([reader, last], 2)
    last.read(texts[:1, :1])
    reader = engine.join([reader, last], 2)
    assert reader.length == 8


@torch.no_grad()
def test_many_sequences_are_joined_in_groups(
    one_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(engine_module, "CompiledStep", uncompiled_steps(made))
    engine, plan, texts = Engine(packed(one_decoder), SwitchPoints()), uniform(TopK(1)), (20, 10, 3)
    tokens = torch.randint(V, (33, 12))
    alone = token_by_token(one_decoder, plan, tokens, 0)
    readers = []
    for n, rows in zip(texts, tokens.split(texts), strict=True):
        readers.append(engine.open(n, 9, plan))
        readers[-1].read(rows[:, : 1 + n % 7])
    at = torch.tensor([1 + n % 7 for n in texts for _ in range(n)])
    reader = engine.join(readers, 4)
    rows = torch.arange(33)
    for kept in (rows, rows, rows.flip(0)[4:], rows[1:12]):
        if len(kept) < len(rows):
            reader.keep(kept.tolist())
            tokens, alone, at, rows = tokens[kept], alone[kept], at[kept], rows[: len(kept)]
        found = reader.read(tokens[rows, at][:, None])
        assert reader.n_sequences == len(rows)
        assert_near(found, alone[rows, at])
        at = at + 1
    assert made == [16, 1, 8, 4]
    with pytest.raises(ValueError, match="needs a sequence or more"):
        reader.keep([])


def test_a_model_moved_to_another_type_gets_new_steps(
    one_decoder: Decoder, tokens: Tensor, compilations: list[tuple[SelectionPlan, int]]
) -> None:
    plan = uniform(TopK(1))
    model = compile_sparse(one_decoder, plan)
    for n_sequences in (1, 3):
        model.generate(tokens[:n_sequences, :4], 3)
    model.bfloat16()
    for n_sequences in (1, 3):
        model.generate(tokens[:n_sequences, :4], 3)
    assert compilations == [(plan, 1), (plan, 4)] * 2


@pytest.mark.parametrize("first", [0, 1, 6, 9])
def test_from_the_second_switch_point_on_experts_run_on_their_own_tokens(
    first: int, one_decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward_tokens = engine_module.forward_tokens

    def recorded(*args: Any, grouped: bool, **options: Any) -> Any:
        seen.append(grouped)
        return forward_tokens(*args, grouped=grouped, **options)

    monkeypatch.setattr(engine_module, "forward_tokens", recorded)
    engine = Engine(packed(one_decoder), SwitchPoints(gather_up_to=0, grouped_from=first))
    shapes = [(1, 1), (1, 5), (5, 1), (1, 6), (2, 3), (3, 3)]
    for shape in shapes:
        engine.forward(torch.zeros(shape, dtype=torch.long), uniform(ThresholdTopK(0.5)))
    assert seen == [batch * length >= first for batch, length in shapes]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of sequences for which steps were to be compiled, where no compiler is."""
    numbers: list[int] = []

    def refuse(decoder: Decoder, plan: SelectionPlan, n: int, **options: Any) -> None:
        numbers.append(n)
        raise CannotCompile("no compiler here")

    monkeypatch.setattr(engine_module, "CompiledStep", refuse)
    return numbers


def test_a_reason_not_to_compile_is_told_once_and_no_more_is_tried_after_the_second_time(
    one_decoder: Decoder, attempts: list[int]
) -> None:
    engine, plan = Engine(packed(one_decoder), SwitchPoints()), uniform(TopK(1))
    message = "of 1 sequence runs uncompiled, more slowly: no compiler here; once .* warm_up"
    with pytest.warns(UserWarning, match=message):
        assert not decoded(engine, plan, 1)
    assert not any(decoded(engine, plan, n) for n in (1, 2, 4, 8))
    assert not decoded(engine, uniform(TopK(2)), 1)
    assert not engine.start_warm_up(plan, 16)
    assert attempts == [1, 2]


def test_what_was_mended_is_compiled(
    one_decoder: Decoder,
    compilations: list[tuple[SelectionPlan, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = {1, 2, 4}

    class Breaking(FakeStep):
        def __init__(self, decoder: Decoder, plan: SelectionPlan, n: int, **options: Any) -> None:
            if n in broken:
                raise CannotCompile("a full disk" if n < 4 else "too little memory")
            super().__init__(decoder, plan, n)

    monkeypatch.setattr(engine_module, "CompiledStep", Breaking)
    engine, plan = Engine(packed(one_decoder), SwitchPoints()), uniform(TopK(1))
    for n, reason in ((4, "too little memory"), (1, "a full disk")):  # other shapes, other reasons
        with pytest.warns(UserWarning, match=f"of {n} sequences? runs .*: {reason};"):
            assert not decoded(engine, plan, n)
        assert not engine.start_warm_up(plan, n)
    assert decoded(engine, plan, 8)
    assert decoded(engine, plan, 4)  # by the larger step
    broken.clear()
    engine.warm_up(plan, 1)
    assert decoded(engine, plan, 1)
    assert compilations == [(plan, 8), (plan, 1)]


def test_warming_up_for_many_numbers_compiles_each_step_once(
    one_decoder: Decoder, compilations: list[tuple[SelectionPlan, int]]
) -> None:
    engine, plan = Engine(packed(one_decoder), SwitchPoints()), uniform(TopK(1))
    engine.warm_up(plan, *range(1, 17))
    assert compilations == [(plan, n) for n in (1, 2, 4, 8, 16)]


def test_warming_up_for_many_numbers_ends_where_nothing_can_be_compiled(
    one_decoder: Decoder, attempts: list[int]
) -> None:
    engine = Engine(packed(one_decoder), SwitchPoints())
    with pytest.warns(UserWarning, match="no compiler here") as warned:
        engine.warm_up(uniform(TopK(1)), *range(1, 17))
    assert len(warned) == 1
    assert attempts == [1, 2]


def test_steps_that_are_there_run_after_others_could_not_be_compiled(
    one_decoder: Decoder,
    compilations: list[tuple[SelectionPlan, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = []

    class Breaking(FakeStep):
        def __init__(self, decoder: Decoder, plan: SelectionPlan, n: int, **options: Any) -> None:
            attempts.append(n)
            if n > 4:
                raise CannotCompile("too little memory")
            super().__init__(decoder, plan, n)

    monkeypatch.setattr(engine_module, "CompiledStep", Breaking)
    engine, plan = Engine(packed(one_decoder), SwitchPoints()), uniform(TopK(1))
    assert decoded(engine, plan, 4)
    with pytest.warns(UserWarning, match="of 8 sequences .* too little memory"):
        assert not decoded(engine, plan, 8)
    assert not decoded(engine, plan, 16)
    assert decoded(engine, plan, 4)
    assert decoded(engine, plan, 1)  # by the larger step, since no more are compiled
    assert not decoded(engine, plan, 9)  # for which both steps would be needed
    assert attempts == [4, 8, 16]
    assert not engine.start_warm_up(plan, 1)


def test_threads_that_meet_a_plan_together_compile_one_step(
    one_decoder: Decoder,
    compilations: list[tuple[SelectionPlan, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together, at_work = Barrier(4), []

    class Slow(FakeStep):
        def __init__(self, *args: Any, **options: Any) -> None:
            at_work.append(1)
            time.sleep(0.05)
            assert len(at_work) == 1
            at_work.pop()
            super().__init__(*args, **options)

    monkeypatch.setattr(engine_module, "CompiledStep", Slow)
    monkeypatch.setattr(Engine, "ready_step", Engine.compiled_step)
    engine = Engine(packed(one_decoder), SwitchPoints())
    ready = engine.compiled_step(uniform(TopK(1)), 3)
    with engine_module.COMPILING:  # nobody waits for what is there
        assert engine.compiled_step(uniform(TopK(1)), 3) is ready

    def decode(n_sequences: int) -> bool:
        together.wait()
        return decoded(engine, uniform(TopK(1)), n_sequences)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decode, [1, 1, 2, 2])) == [True] * 4
    assert sorted(n for _, n in compilations) == [1, 2, 4]


def test_a_full_context(tokens: Tensor) -> None:
    context = Engine(packed(rotary_mlp()), UNCOMPILED).open(3, 15, uniform(AllExperts()))
    context.read(tokens)
    context.read(tokens[:, :1])
    with pytest.raises(ValueError, match="16 tokens do not fit a cache of 15"):
        context.read(tokens[:, :1])
