"""A checkpoint converted into eight bits: on disk, loaded, planned, trained from and verified."""

import dataclasses
import json

import numpy as np
import pytest

from adacm2_jax.config import QUANTIZED
from adacm2_jax.errors import UserError
from adacm2_jax.inference.encoder import fingerprint
from adacm2_jax.models.params import abstract_params, join_params, split_params
from adacm2_jax.models.quantized import kind_of
from adacm2_jax.plan.of_run import get_config
from adacm2_jax.plan.steps import make_plan, params_bytes, trace
from adacm2_jax.port.__main__ import main
from adacm2_jax.port.formats import TorchParams, open_checkpoint
from adacm2_jax.port.importer import import_checkpoint
from adacm2_jax.port.store import open_ours
from adacm2_jax.port.verify import compare_values
from adacm2_jax.runs import load
from adacm2_jax.runs.checkpoint import Checkpoints, restore_params
from adacm2_jax.runs.experiment import read
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.optim import make_optimizer
from adacm2_jax.training.step import init_train_state
from tests.small import error_line, quick_compilation

KERNEL = "llm/layers/down/kernel"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def weights(hugging_face, tmp_path_factory):
    """The same checkpoint as it is, and in every kind of eight bits."""
    root = tmp_path_factory.mktemp("weights")
    for kind in ("", *QUANTIZED):
        import_checkpoint([hugging_face], root / (kind or "plain"), quantize=kind)
    return root


def kept_as(directory, kind: str):
    """The experiment of a converted checkpoint, with its language model in ``kind``."""
    experiment = load.experiment_of(directory)
    llm = dataclasses.replace(experiment.model.llm, quantize=kind)
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, llm=llm))


def spared(weights) -> int:
    """Bytes of float32 matrices less those of int8 and of its scales, by the shapes."""
    plain, kept = (open_ours(weights / name)[1] for name in ("plain", "int8"))
    matrices = sum(np.prod(s) for p, s in kept.shapes.items() if kind_of(kept.dtypes[p]))
    scales = sum(np.prod(s) for p, s in kept.shapes.items() if p not in plain.shapes)
    return 3 * matrices - 4 * scales


@pytest.mark.parametrize("kind", QUANTIZED)
def test_converted_and_quantised_at_load_are_bit_by_bit_the_same(weights, kind):
    assert load.experiment_of(weights / kind).model.llm.quantize == kind
    converted = load.load_params(load.experiment_of(weights / kind), weights / kind)
    at_load = load.load_params(kept_as(weights / "plain", kind), weights / "plain")
    for layer in converted["llm"]["layers"]:
        assert kind_of(layer["out"]["kernel"].dtype) == kind
    assert fingerprint(converted) == fingerprint(at_load)


def test_the_file_keeps_one_of_four_bytes_of_a_matrix(weights):
    bases = [json.loads((weights / name / "base.json").read_text()) for name in ("plain", "int8")]
    assert bases[0]["bytes"] - bases[1]["bytes"] == spared(weights)
    assert bases[0]["fingerprint"] != bases[1]["fingerprint"]


@pytest.mark.parametrize("wanted", ["", "fp8"])
def test_what_is_stored_in_eight_bits_is_not_taken_for_something_else(weights, wanted):
    experiment = kept_as(weights / "int8", wanted)
    with pytest.raises(UserError, match=r"holds its language model in int8 alone: set model\.llm"):
        load.check_params(experiment, weights / "int8")


def test_a_run_starts_from_either_and_goes_on(weights, tmp_path):
    """Its frozen language model stays with the base, or, where it was quantised at the start, with
    the run; both times it is read again as it was."""
    for name in ("int8", "plain"):
        experiment = kept_as(weights / name, "int8")
        groups = (("(vision|llm)/.*", None), (".*", 1.0))
        shapes = abstract_params(experiment.model, groups, make_mesh())
        params = load.start_params(weights / name, experiment.model, shapes, ("temporal.*",), 0)
        learned, frozen = split_params(params, groups)
        rule = dict(learning_rate=1e-3, steps=2, warmup_steps=1, weight_decay=0.0)
        optimizer, _ = make_optimizer(
            learned, groups=groups, b1=0.9, b2=0.99, clip_norm=1.0, **rule
        )
        state = init_train_state(learned, frozen, optimizer, make_mesh())
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save_frozen(state.frozen, str(weights / name))
        checkpoints.save(state, {})
        checkpoints.wait()
        assert (tmp_path / name / "frozen").exists() == (name == "plain")
        again = restore_params(tmp_path / name, shapes)
        assert fingerprint(join_params(again, {})) == fingerprint(params)
        checkpoints.close()


def test_the_planner_counts_one_byte_a_number(weights):
    mesh = make_mesh()
    sizes = {}
    for name in ("plain", "int8"):
        plan = make_plan(read(get_config(str(weights / name))), "decode")
        sizes[name] = params_bytes(plan, mesh)
    assert sizes["plain"] - sizes["int8"] == spared(weights)


def test_to_train_the_quantised_model_itself_is_refused(weights):
    experiment = kept_as(weights / "int8", "int8")
    optim = dataclasses.replace(experiment.optim, groups=((".*", 1.0),))
    plan = make_plan(dataclasses.replace(experiment, optim=optim), "train")
    with pytest.raises(UserError, match="quantize = 'int8', but llm/layers/down/kernel learns"):
        trace(plan, make_mesh())


def test_export_says_that_there_is_no_place_for_it(weights, tmp_path, capsys):
    arguments = ["export", "--src", weights / "int8", "--dst", tmp_path / "out", "--format", "hf"]
    assert main(list(map(str, arguments))) == 2
    assert "holds its language model in int8 alone" in error_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_values_are_verified_against_the_original_quantised_again(weights, hugging_face, kind):
    source = open_checkpoint([hugging_face])
    theirs, ours = TorchParams(source), open_ours(weights / kind)[1]
    rows = {row.what: row for row in compare_values(theirs, ours)}
    assert all(row.good for row in rows.values())
    assert rows["llm"].error == 0
    # Half of the last step: of 127.5 of them, or of fp8's numbers of four digits.
    most = {"int8": 0.5 / 127.5, "fp8": 2**-4}[kind]
    assert most / 3 < rows[f"llm, {kind}"].error <= most * 1.001

    stored, ours.read = ours.read, None

    def changed(path, layer=None):
        values = np.array(stored(path, layer))
        if path == KERNEL and layer == 1:
            values.view(np.uint8).reshape(-1)[7] ^= 1
        return values

    ours.read = changed
    rows = {row.what: row for row in compare_values(theirs, ours)}
    source.close()
    assert [row.what for row in rows.values() if not row.good] == [f"llm, {kind}"]
