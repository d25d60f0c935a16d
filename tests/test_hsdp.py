"""--parallel=hsdp: each node shards one copy of the model; four ranks are two nodes of two."""

import json
import re
import shutil

import pytest
import torch
from test_survival import NODES, difference, read
from test_train import TINY, argv, log, run

import train
from configurator import configure
from model import VLM
from training import checkpoint, distributed
from training.traffic import traffic_plan

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TWO_LAYERS = ["--llm.n_layers=2", "--alignment.drop_path=0.3"]


@pytest.fixture(scope="module")
def finished(zygote, shards, tmp_path_factory):
    """{what: run folder} of the same four steps of four packs, trained in each way."""
    folder = tmp_path_factory.mktemp("finished")
    for how, ranks, accum in (("ddp", 1, 4), ("ddp", 2, 2), ("fsdp", 4, 1), ("hsdp", 4, 1)):
        more = [f"--parallel={how}", f"--grad_accum_steps={accum}", "--save_every=2", *TWO_LAYERS]
        start(zygote, folder / f"{how}_{ranks}", shards, more, ranks)
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def start(zygote, out, shards, more, ranks=4, code="", steps=4, exits=0):
    """Run a stage in which everything trains; returns what the ranks printed."""
    text = out.with_suffix(".txt")
    flags = argv(out, shards, *more, stages=("alignment",), steps=steps, everything=True)
    codes = zygote.run("train", flags, ranks, text, (NODES if ranks == 4 else "") + code)
    assert codes == [exits] * ranks, text.read_text()
    return text.read_text()


# ---- the same training ---------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["ddp_1", "ddp_2", "fsdp_4"])
def test_two_nodes_take_the_steps_of_ddp_and_fsdp(finished, other):
    for a, b in zip(log(finished["hsdp_4"]), log(finished[other]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert (a["samples"], a["tokens"], a["lr"]) == (b["samples"], b["tokens"], b["lr"])
    assert difference(read(finished["hsdp_4"], 4), read(finished[other], 4)) < 1e-5


SPY = """
import torch.distributed as td
calls = []
def spy(name, what):
    original = getattr(td, name)
    def call(*args, **settings):
        tensors = [x for x in (*args, *settings.values()) if hasattr(x, "nbytes")]
        n = td.get_world_size(settings.get("group"))
        calls.append((what, n, max(x.nbytes for x in tensors)))
        return original(*args, **settings)
    setattr(td, name, call)
names = {"all_reduce": "sum",
         "reduce_scatter_tensor": "scatter", "reduce_scatter_single": "scatter",
         "all_gather_into_tensor": "gather", "all_gather_single": "gather"}
for name in names.keys() & vars(td).keys():  # PyTorch 2.13 has new names for two of them
    spy(name, names[name])
note = distributed.set_gradient_sync
def marked(model, on):
    calls.append(("micro-batch", on, 0))
    note(model, on)
distributed.set_gradient_sync = marked
clip = optim.clip_grad_norm
def stop(model, most):
    if RANK == 0:
        import json
        json.dump(calls, open(OUT, "w"))
    calls.clear()
    return clip(model, most)
optim.clip_grad_norm = stop
"""


def test_nodes_sum_gradients_once_a_step_and_gather_nothing_from_one_another(
    zygote, shards, tmp_path, monkeypatch
):
    more = ["--parallel=hsdp", "--grad_accum_steps=3", "--dtype=bfloat16", *TWO_LAYERS]
    code = SPY + f"OUT = {str(tmp_path / 'calls.json')!r}"
    start(zygote, tmp_path / "r", shards, more, code=code, steps=1)
    micro = []
    moved = {"sum": 0, "scatter": 0, "gather": 0}
    for name, about, nbytes in json.loads((tmp_path / "calls.json").read_text()):
        if name == "micro-batch":
            micro.append({"last": about, "sum": 0, "scatter": 0, "gather": 0})
        elif name != "sum" or about == 2:  # the loop itself sums numbers over all ranks
            micro[-1][name] += 1
            moved[name] += nbytes
            assert about == 2, f"{name} over {about} ranks"
    units = 4  # two blocks, the ViT, all the rest
    assert [m["last"] for m in micro] == [False, False, True]
    assert [m["scatter"] for m in micro] == [units] * 3
    assert [m["sum"] for m in micro] == [0, 0, units]
    assert all(m["gather"] >= units for m in micro)

    # --dry_run counts the same bytes: of 2 ranks that share each sends half, as of 2 nodes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cfg = train.Config()
    configure(cfg, [flag for flag in TINY + TWO_LAYERS if "threads" not in flag])
    with torch.device("meta"):
        plan = traffic_plan("hsdp", VLM(cfg.vision, cfg.llm, 0), 4)
    assert plan.step_between == pytest.approx(moved["sum"], rel=0.02)
    assert 3 * plan.pack_inside == pytest.approx(
        (moved["scatter"] + moved["gather"]) / 2, rel=0.02)


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_holds_each_shard_once_and_both_nodes_write_of_it(finished):
    sizes = {}
    for how in ("fsdp_4", "hsdp_4"):
        path = checkpoint.find_checkpoint(finished[how])
        sizes[how] = {f.name: f.stat().st_size for f in path.glob("*.distcp")}
    tensors = sum(t.nbytes for t in read(finished["hsdp_4"], 4).values())
    # headers of the tensors come on top
    assert sum(sizes["hsdp_4"].values()) <= sum(sizes["fsdp_4"].values()) < 2 * tensors
    written = [sum(n for name, n in sizes["hsdp_4"].items() if name.startswith(f"__{rank}_"))
               for rank in range(4)]
    assert min(written) > 0.1 * sum(written), written


def test_a_run_on_two_nodes_resumes_byte_for_byte(zygote, shards, finished, tmp_path):
    out = tmp_path / "again"
    first = "checkpoints/step_00000002"
    shutil.copytree(finished["hsdp_4"] / first, out / first)
    more = ["--parallel=hsdp", "--grad_accum_steps=1", "--save_every=2", *TWO_LAYERS]
    assert "resumes at step 2" in start(zygote, out, shards, more)
    assert difference(read(out, 4), read(finished["hsdp_4"], 4)) == 0
    model = "alignment/model.safetensors"
    assert (out / model).read_bytes() == (finished["hsdp_4"] / model).read_bytes()


@pytest.mark.parametrize(
    "source, how, ranks",
    [
        ("fsdp_4", "hsdp", 4),
        ("hsdp_4", "fsdp", 2),
        pytest.param("ddp_1", "hsdp", 4, marks=pytest.mark.nightly),
        pytest.param("hsdp_4", "ddp", 1, marks=pytest.mark.nightly),
    ],
)
def test_a_run_goes_on_with_another_layout_and_number_of_ranks(
    zygote, shards, finished, tmp_path, source, how, ranks
):
    out = tmp_path / "again"
    first = "checkpoints/step_00000002"
    shutil.copytree(finished[source] / first, out / first)
    accum = int(source.startswith("ddp")) * 3 + 1
    more = [f"--parallel={how}", f"--grad_accum_steps={accum}", "--save_every=2", *TWO_LAYERS]
    assert "resumes at step 2" in start(zygote, out, shards, more, ranks)
    assert difference(read(out, 4), read(finished[source], 4)) < 1e-5


# ---- what it refuses and what it says ------------------------------------------------------------


@pytest.mark.parametrize(
    "world, of_node, says",
    [
        ("8", "8", "8 ranks are one; set --parallel=fsdp, which does the same"),
        ("1", None, "a node has one rank; set --parallel=ddp"),
        ("4", "1", "a node has one rank; set --parallel=ddp"),
        ("12", "8", "12 ranks are not nodes of 8 ranks each; use a multiple of 8, or"),
        ("16", "x", "LOCAL_WORLD_SIZE is 'x' and not a number"),
    ],
)
def test_a_number_of_ranks_that_are_no_nodes_is_refused_with_what_to_do(
    monkeypatch, world, of_node, says
):
    monkeypatch.setenv("WORLD_SIZE", world)
    if of_node:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_node)
    flags = ["--parallel=hsdp", "--dry_run=True", "--alignment.lr_projector=1e-3",
             "--stages=alignment"]
    with pytest.raises(ValueError, match=re.escape(says)):
        run(train, flags, monkeypatch)


@pytest.mark.parametrize(
    "places, says",
    [
        ('{"LOCAL_WORLD_SIZE": "4"}', "4 ranks are one; set --parallel=fsdp"),
        ('{"LOCAL_WORLD_SIZE": "23"[RANK % 2]}', "and there are nodes of 2 and 3"),
        ('{"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(RANK // 2)}', "one after the other"),
    ],
)
def test_ranks_that_lie_otherwise_end_with_one_line_each(zygote, shards, tmp_path, places, says):
    code = f"os.environ.update({places})"
    text = start(zygote, tmp_path / "r", shards, ["--parallel=hsdp"], code=code, exits=2)
    # Ranks write at the same time, so that a line may end behind the next one's beginning.
    errors = text.split("error: ")[1:]
    assert len(errors) == 4 and all(says in error for error in errors), text
    assert "Traceback" not in text


def test_a_plan_divides_the_model_by_the_ranks_of_a_node(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "64")
    found = {}
    for how in ("fsdp", "hsdp"):
        flags = ["config/pretrain_8b.py", f"--parallel={how}", "--dry_run=True"]
        run(train, flags, monkeypatch)
        text = capsys.readouterr().out
        found[how] = [float(x) for x in re.findall(r"moments: ([\d.]+) GB per GPU", text)]
    assert found == {"fsdp": [0.3, 0.3], "hsdp": [2.0, 2.6]}


def test_a_plan_without_torchrun_takes_nodes_of_eight(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert distributed.shards_of("hsdp", 64) == 8
    assert distributed.shards_of("fsdp", 64) == 64
    assert distributed.shards_of("ddp", 64) == 1
