"""``dalle2 train``: trains one stage of a system; the same command continues an interrupted run."""

import pathlib
import re
import sys
from typing import Any, cast

from absl import flags
from ml_collections import ConfigDict, config_flags

from dalle2_jax.cli import args
from dalle2_jax.config import pages
from dalle2_jax.errors import UsageError, UserError, shown

HELP = """usage: dalle2 train --config FILE:STAGE --workdir FOLDER [--config.FIELD=VALUE ...]

Trains one stage of a system; the same command continues an interrupted run. Train the stages in this order: clip,
then prior and decoder, which need clip; the upsamplers need no other stage.

options:
  --config FILE:STAGE    a config page and one of its stages, as in configs/shapes.py:decoder, or the name of a page
                         that comes with the package, as in shapes:decoder (dalle2 init copies those pages)
  --config.FIELD=VALUE   another value for any field, as in --config.optim.lr=1e-4
  --config.init_from=SYSTEM
                         start from the weights of another system's stage; with --config.lora="{'rank': 8}", train
                         only a LoRA of them
  --config.resume_changes=True
                         continue a run with other values in its section optim
  --workdir FOLDER       the system's folder; the stage is written to a folder of its own name in it
  --profile FIRST,LAST   write a trace of these steps, counted from the first of this command, to the stage's folder
  --[no]multihost        join the other hosts of a pod first
  --noverify             load checkpoints without checking their digests, which detect damage on disk
  --heartbeat SECONDS    with --multihost: seconds without a heartbeat after which a host counts as lost (default 15)
  --debug                print the traceback of an unexpected error

example:
  python train.py --config configs/shapes.py:decoder --workdir runs/demo --config.optim.lr=1e-4
"""


def main() -> None:
    """Trains the stage that the process's arguments describe."""
    if {"--help", "-h"}.intersection(sys.argv[1:]):
        print(HELP, end="")
        return
    values = parse_flags(sys.argv)
    if not values.multihost:
        run(values)
        return
    from dalle2_jax.cli.process.supervise import supervise

    supervise()
    from dalle2_jax.training import hosts

    with hosts.joined(values.heartbeat):
        run(values)


def run(values: flags.FlagValues) -> None:
    """Trains the stage that the flags describe."""
    from dalle2_jax import compilation
    from dalle2_jax.config.experiment import Experiment, resume_changes
    from dalle2_jax.run import train_stage
    from dalle2_jax.training.reporting.profiling import Profile
    from dalle2_jax.workdir import digests

    compilation.enable_compilation_cache()
    experiment, page = Experiment.from_config(values.config), cast(Any, values["config"]).config_filename
    profile = Profile.parse(values.profile) if values.profile else None
    options = {"page": page, "resume_changes": resume_changes(values.config), "profile": profile}
    with digests.unverified(not values.verify):
        state = train_stage(experiment, values.workdir, **options)
    print(f"{experiment.stage}: {int(state.step)} steps, in {pathlib.Path(values.workdir) / experiment.stage}")


# --- flags ----------------------------------------------------------------------------------


def parse_flags(words: list[str]) -> flags.FlagValues:
    """Reads the command line.

    Args:
      words: of the process, the program's name first.

    Raises:
      UsageError: an unknown flag, file or field.
    """
    values = make_flags()
    try:
        rest = values(joined(words))
    except UserError:
        raise
    except KeyError as error:
        section = " ".join(str(error.args[0]).split()) if error.args else "of that name"
        raise UsageError(f"the config has no section {section}: set a whole section, --config.lora={{...}}") from error
    except Exception as error:  # absl's own, and whatever its parsers of values raise
        raise UsageError((str(error).strip() or type(error).__name__).splitlines()[0][:300]) from error
    if not values.config or not values.workdir:
        raise UsageError("give --config FILE:STAGE and --workdir FOLDER; see dalle2 train --help")
    if rest[1:]:
        raise UsageError(f"unexpected word {shown(rest[1])} on the command line; see dalle2 train --help")
    return values


def joined(words: list[str]) -> list[str]:
    """Joins ``--config.FIELD VALUE`` to one word: for a field that is not in the page, absl would read True."""
    result: list[str] = []
    for word in words:
        if result and re.fullmatch(r"--config\.[\w.]+", result[-1]) and not word.startswith("--"):
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


class ConfigFile(flags.ArgumentParser):
    """Reads FILE:STAGE for absl."""

    def parse(self, argument: str) -> ConfigDict:
        """Returns the config of a stage. UsageError if the page cannot be run."""
        config = pages.call_config_page(argument)
        if not isinstance(config, ConfigDict):
            raise UsageError(f"get_config of {argument} returns {shown(config)} and not a ConfigDict")
        return config


def make_flags() -> flags.FlagValues:
    """Returns the command's flags, without values."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "FILE:STAGE", lock_config=False, accept_new_attributes=True, flag_values=values
    )
    values["config"].parser = ConfigFile()
    flags.DEFINE_string("workdir", None, "folder of the system", flag_values=values)
    flags.DEFINE_bool("debug", False, "print the traceback of an unexpected error", flag_values=values)
    flags.DEFINE_bool("verify", True, args.NOVERIFY, flag_values=values)
    flags.DEFINE_string("profile", None, "FIRST,LAST: steps of which a trace is written", flag_values=values)
    flags.DEFINE_bool("multihost", False, "join the other hosts of a pod", flag_values=values)
    lost = "seconds without a heartbeat after which a host counts as lost"
    flags.DEFINE_integer("heartbeat", args.HEARTBEAT, lost, lower_bound=1, flag_values=values)
    return values
