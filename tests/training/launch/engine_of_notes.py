"""Starts ranks by the trainer's engine for each case, ranks that only write down what they see. Prints it all as JSON.

engine_of_notes.py FOLDER '[["cuda", "4,6"], ["cpu", null]]' < spec.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch.distributed.launcher.api import elastic_launch

from training.launch.launcher import launch_config
from training.spec import JobSpec


def main() -> None:
    spec = JobSpec.model_validate_json(sys.stdin.read())
    said: list[object] = []
    for number, (device, shown) in enumerate(json.loads(sys.argv[2])):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ.update({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown})
        seen = Path(sys.argv[1], str(number))
        seen.mkdir()
        note = (
            f"import os, pathlib; pathlib.Path({str(seen)!r}, os.environ['RANK']).write_text("
            "os.environ['LOCAL_RANK'] + ' ' + os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
        )
        try:
            elastic_launch(launch_config(spec.model_copy(update={"device": device})), sys.executable)("-c", note)
        except ValueError as error:
            said.append(str(error))
        else:
            said.append([path.read_text() for path in sorted(seen.iterdir())])
    print(json.dumps(said))


if __name__ == "__main__":
    main()
