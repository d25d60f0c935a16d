"""A stage whose program has a fault on purpose: does the judge of proof.py see it?

    python tests/nogpu/mutant.py OUT

An index of the embeddings is left on the CPU, in ablation's alignment without torch.compile.
PyTorch carries it out without a word. The last line is JSON.
"""
import json
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]
import proof  # noqa: E402
import stage  # noqa: E402

import model as model_file  # noqa: E402


def leave_an_index_on_the_cpu():
    embed = model_file.VLM.embed

    def mutant(self, tokens, tiles):
        h = embed(self, tokens, tiles)
        return h[stage.torch.arange(len(h))]

    model_file.VLM.embed = mutant


def main():
    out = Path(sys.argv[1])
    folder = out / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    leave_an_index_on_the_cpu()
    sys.argv = ["stage.py", "train.py", "config/pretrain_2b.py", "config/ablation.py",
                "--init_from=", "--num_workers=0", "--tokenizer=toy/llm", "--stages=alignment",
                f"--data={out}/toy/*-*.tar", "--compile=off", f"--out_dir={folder}"]
    stage.main()
    mixed = stage.Measured.rows[-1]["mixed"]
    found = proof.mixed_faults(mixed)
    faults = []
    # forward and backward; nothing else in the program may mix
    if mixed.keys() != {"aten::index", "aten::index_put"}:
        faults.append(f"an index was left on the CPU, and what is found is {found}")
    print(json.dumps({"faults": faults, "says": f"an index on the CPU is found: {found}"}))


if __name__ == "__main__":
    main()
