"""Environment variables of a submitted job: how their values travel to the job's driver and workers.

Ray logs the ``env_vars`` of a runtime environment on every node and shows them to whoever may list jobs. So the values
travel as a package of their own, one file that Ray unpacks on sys.path, and every process of the job reads it when it
starts: the driver because it is run as ``python -m jobs.environment edit ...``, the workers by Ray's setup hook.
"""

import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGE = "diffusionclip_environment"
FILE = "values.json"
HOOK = "jobs.environment.load"


def save(values: Mapping[str, str], parent: Path) -> Path:
    """The package with the values, in a folder of ``parent``; readable by this user only.

    Ray names packages by a hash of what is in them and logs the names; the salt keeps anyone from trying values out on it.
    """
    folder = parent / PACKAGE
    folder.mkdir(mode=0o700)
    file = folder / FILE
    file.touch(mode=0o600)
    file.write_text(json.dumps({"salt": secrets.token_hex(), "values": dict(values)}))
    return folder


def load() -> None:
    """Sets the variables in this process. Raises RuntimeError if they did not come with the job."""
    for folder in sys.path:
        file = Path(folder, PACKAGE, FILE)
        if file.is_file():
            os.environ.update(json.loads(file.read_text())["values"])
            return
    raise RuntimeError(f"the job's environment variables are missing on this node: there is no {PACKAGE}/{FILE} on sys.path")


if __name__ == "__main__":
    load()
    from jobs.cli import main

    sys.argv[0] = "diffusionclip"
    main()
