"""toy/records.py and toy/__main__.py: the same samples every time, in ordinary files."""
from rows import TOY, dataset_of

from toy import __main__ as toy
from toy.draw import draw_picture, jpeg_bytes
from toy.records import LEVELS, toy_record


def test_samples_are_a_pure_function_of_the_seed():
    for part in LEVELS:
        row, boards = toy_record(5, part, 7)
        again, boards_again = toy_record(5, part, 7)
        assert row == again
        pictures = [jpeg_bytes(draw_picture(board, rng)) for board, rng in boards]
        assert pictures == [jpeg_bytes(draw_picture(board, rng)) for board, rng in boards_again]
        assert toy_record(6, part, 7)[0] != row


def test_shards_are_ordinary_webdataset_tars_and_a_finished_shard_is_kept(tmp_path):
    cfg = toy.Config(out=str(tmp_path), n="40")
    toy.write_parts(cfg, ["instruction"])
    path = tmp_path / "instruction-000000.tar"
    before = path.stat().st_mtime_ns
    toy.write_parts(cfg, ["instruction"])
    assert path.stat().st_mtime_ns == before
    dataset = dataset_of(path, tokens_per_pack=600, tiles_per_pack=40)
    assert dataset.packs.n == 40 and dataset.packs.n_bad == 0
    batch = dataset[next(dataset.packs.sequence())]
    assert not batch["bad"]
    assert (batch["tokens"] == TOY.image_id).sum() == 9 * len(batch["tiles"])


def test_files_of_other_settings_are_removed_and_those_of_the_same_stay(tmp_path):
    written = []
    for n in (20, 20, 30):
        cfg = toy.Config(out=str(tmp_path), n=str(n))
        toy.remove_outdated(cfg)
        toy.write_parts(cfg, ["knowledge"])
        written.append((tmp_path / "knowledge-000000.tar").stat().st_mtime_ns)
    first, again, other = written
    assert first == again != other
