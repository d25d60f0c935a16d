"""curation/balance.py: a balanced subset, the same every time."""
import collections

import numpy as np
import torch
from curation_helpers import encoded, make_small_collection, run_well, scene, stage_files, write_tar
from toy_endpoint import read_shards

from curation import balance


def test_select_is_balanced_over_sources_and_clusters_and_reproducible(tmp_path):
    rng = np.random.default_rng(3)
    for name, n in (("big", 90), ("small", 12)):
        members = [(f"{i}.png", encoded(scene(rng, 70), format="PNG")) for i in range(n)]
        write_tar(tmp_path / name / "0.tar", members)
    run_well("collect", f"--in=big={tmp_path}/big,small={tmp_path}/small", f"--out={tmp_path}/c")
    flags = [f"--in={tmp_path}/c", "--n=24", "--clusters=1"]
    assert run_well("select", *flags, f"--out={tmp_path}/a")["out"] == 24
    sources = collections.Counter(row["source"] for row in read_shards(tmp_path / "a"))
    assert sources == {"big": 12, "small": 12}
    run_well("select", *flags, f"--out={tmp_path}/b")
    assert stage_files(tmp_path / "a") == stage_files(tmp_path / "b")
    run_well("select", *flags, "--seed=1", f"--out={tmp_path}/s")
    assert stage_files(tmp_path / "a") != stage_files(tmp_path / "s")


def test_no_cell_gives_more_than_another_that_could():
    assert balance.fair_shares(np.array([5, 1, 100, 0]), 16).tolist() == [5, 1, 10, 0]


def test_kmeans_finds_three_groups():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.eye(3, dtype=np.float32) * 9, 50, axis=0)
    groups += rng.normal(size=(150, 3)).astype(np.float32)
    centres = balance.kmeans(groups, 3, 1)
    clusters = balance.nearest_centre(torch.from_numpy(groups), centres).tolist()
    pairs = set(zip(clusters, np.repeat(range(3), 50).tolist(), strict=True))
    assert len(pairs) == 3


def test_a_shard_without_rows_does_not_stop_a_selection_by_vit_features(tmp_path):
    folder, _ = make_small_collection(tmp_path)
    write_tar(folder / "c" / "empty.tar", [])
    flags = [f"--model={folder}/model", "--dtype=float32", "--n=5", "--clusters=2"]
    assert run_well("select", f"--in={folder}/c", f"--out={folder}/s", *flags)["out"] == 5
