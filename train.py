"""Trains one stage of a system; the same command continues an interrupted run.

    python train.py --config configs/shapes.py:decoder --workdir runs/demo [--config.optim.lr=1e-4 ...]

Stages build on each other: clip first, then prior and decoder; the upsamplers need none.

    python train.py --config configs/shapes.py:decoder --config.init_from runs/demo --workdir runs/mine

starts from the weights of another system's stage; with --config.lora="{'rank': 8}" only a LoRA of them is trained.

  --config FILE:STAGE    a config file and one of its stages, as in configs/shapes.py:decoder
  --config.FIELD=VALUE   another value for any field, as in --config.optim.lr=1e-4
  --workdir FOLDER       the system's folder; the stage gets a folder of its name in it
  --[no]multihost        join the other hosts of a pod before anything else
"""

import os
import pathlib
import re
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from absl import flags
from ml_collections import config_flags

from dalle2_jax import entry
from dalle2_jax.job import build_job, record_contract
from dalle2_jax.training.loop import train
from dalle2_jax.types import UsageError

CONFIG = config_flags.DEFINE_config_file("config", None, "FILE:STAGE", lock_config=False, accept_new_attributes=True)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the system")
MULTIHOST = flags.DEFINE_bool("multihost", False, "join the other hosts of a pod")


def joined(words: list[str]) -> list[str]:
    """Makes one word of ``--config.FIELD VALUE``: to a field that the config file leaves out it would give True."""
    result: list[str] = []
    for word in words:
        if result and re.fullmatch(r"--config\.[\w.]+", result[-1]) and not word.startswith("--"):
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def parse_flags() -> None:
    """Reads the command line. UsageError for a word, file or field that is not there."""
    try:
        rest = flags.FLAGS(joined(sys.argv))
        if not CONFIG.value or not WORKDIR.value:
            raise UsageError("give --config FILE:STAGE and --workdir FOLDER; see python train.py --help")
        _ = CONFIG.value.to_dict  # a file that could not be read shows only when its config is touched
    except (OSError, SyntaxError, ImportError, NameError) as error:
        raise UsageError(f"the config file cannot be read: {str(error).splitlines()[-1].strip()}") from error
    except KeyError as error:
        said = " ".join(str(error.args[0]).split())
        raise UsageError(f"the config has no section {said}: a new one is given whole, --config.lora={{}}") from error
    except (flags.Error, AttributeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        reason = f"{lines[-1]}; --config is FILE:STAGE" if "Traceback" in str(error) else lines[0]
        raise UsageError(reason) from error
    if rest[1:]:
        raise UsageError(f"unexpected word {rest[1]!r} on the command line; see python train.py --help")


def main() -> None:
    """Builds the job that the flags describe, and trains it."""
    parse_flags()
    if MULTIHOST.value:
        jax.distributed.initialize()
    entry.enable_compilation_cache()
    job = build_job(CONFIG.value, pathlib.Path(WORKDIR.value), flags.FLAGS["config"].config_filename)
    state = train(job)
    record_contract(job, state.ema)
    print(f"{job.stage.name}: {int(state.step)} steps, in {job.folder.path}")


if __name__ == "__main__":
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        sys.exit(0)
    sys.exit(entry.guarded(main))
