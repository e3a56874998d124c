"""Which packages a command needs beyond the core, said before it begins."""

import importlib.util

from megamoe.errors import MegamoeError


def require_packages(extra: str, *names: str) -> None:
    """Raise MegamoeError for the first package that is not installed.

    Args:
        extra: of megamoe, which brings them.
        names: as they are imported.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MegamoeError(
                f"this needs the package {name!r}, which is not installed; "
                f"give `pip install megamoe[{extra}]`"
            )
