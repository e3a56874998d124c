"""The errors a user can cause. Each says, in one line: where, what was given, what would do."""


class MegamoeError(Exception):
    """A mistake of the user's or of the machine's; the command line prints it and exits with 2."""


class RecipeError(MegamoeError):
    """A recipe file, or a value given with --set, is wrong."""


class PlanError(MegamoeError):
    """A recipe does not fit the cluster or the data it was planned for."""


class DataError(MegamoeError):
    """Text, a tokenizer or a shard is missing, malformed or does not match."""


class CheckpointError(MegamoeError):
    """A checkpoint is missing, incomplete or belongs to another plan."""


class TrainingError(MegamoeError):
    """A run cannot start or go on: a non-finite loss, a locked run folder."""


class LaunchError(MegamoeError):
    """Processes or jobs could not be started, or ended early."""
