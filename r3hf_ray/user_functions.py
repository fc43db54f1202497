"""A user's own functions, named in the configuration as `package.module:function`."""

import importlib
from collections.abc import Callable
from typing import Any

from r3hf_ray.errors import ConfigError


def user_function(name: str, *, field: str) -> Callable[..., Any]:
    """The function `package.module:function`.

    Args:
        name: as the user wrote it.
        field: of the configuration, for the sentence.

    Raises:
        ConfigError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        return vars(importlib.import_module(module))[function]  # type: ignore[no-any-return]
    except (ImportError, KeyError, ValueError) as error:
        raise ConfigError(f"{field}: {name!r} names no function ({error}); write package.module:function") from error
