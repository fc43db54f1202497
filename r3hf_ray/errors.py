"""Every error that ends a command in one sentence, and how another error becomes one (floor 0: imports nothing heavy).

`ConfigError` and its kin are found before an actor starts (exit code 2); `RunFailed` and its kin end what had begun
(exit code 1). Whoever raises one writes a sentence for the user: what is wrong, where, and what to do.
"""

import re
from types import TracebackType


class ConfigError(ValueError):
    """The configuration, the data or a model folder cannot be used; the command exits with code 2."""


class ModelError(ConfigError):
    """A model or tokenizer cannot be used; one sentence that names it and says what to do."""


class DataError(ConfigError):
    """The data cannot be used as it is; one sentence that names the file, the line and what to do."""


class Unusable(ValueError):
    """A well-formed row that cannot be used; the message is the reason it is counted under."""


class RunFailed(RuntimeError):
    """What had begun cannot go on; what was done stays on disk, and the command exits with code 1."""


class CoordinatorLost(RunFailed):
    """The coordinator or the weight store is gone; the driver can build everything anew from the last checkpoint."""


class DivergenceError(RunFailed):
    """A loss or gradient is not finite. The weights are still those before the step; the sentence names the capsule."""


class TelescopingError(RunFailed):
    """Token rewards do not add up to the sequence reward: they were shifted, clipped or mixed up on the way."""


class CheckpointError(RunFailed):
    """A checkpoint that is incomplete, of other models, or in the way."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: a cluster or `ray job stop` ends the command; as Ctrl-C, with exit code 143."""


class Caught:
    """Keeps whatever its block raises, for the places where anything may: ``with Caught() as caught: ...``."""

    error: BaseException | None = None

    def __enter__(self) -> "Caught":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return True


def sentence_of(error: BaseException) -> str:
    """The last line of an error that has something in it: a remote traceback ends with the cause.

    Our own errors speak to people, so the name of their class is left out.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^r3hf_ray\.[\w.]+: ", "", lines[-1]) if lines else type(error).__name__
