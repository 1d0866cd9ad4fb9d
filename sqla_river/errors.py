"""What can go wrong, by name.

::

    RiverError
    ├── InvalidOptionError            (ValueError)   an option, name or time outside its rule
    ├── ArgsError                     (ValueError)   args that JSON, PostgreSQL or their own types refuse
    │   ├── EncodeError                              ... when enqueueing
    │   └── DecodeError                              ... when a stored row no longer fits its class
    ├── UniqueRaceError               (RuntimeError) a unique job could neither be put in nor found
    ├── UniqueNeedsEnqueueError       (TypeError)    Job(args) with unique options; the unit of work has no ON CONFLICT
    ├── SessionError                  (TypeError)    a verb was given something that is no session
    │   └── AsyncSessionError                        ... a plain verb an AsyncSession
    ├── WrongDatabaseError            (TypeError)    the session is bound to something that is not PostgreSQL
    ├── MappingError                  (TypeError)    a Job class that cannot be mapped
    ├── RegistrationError             (ValueError)   a handler or kind that cannot be registered
    ├── ConfigError                   (ValueError)   settings that do not go together
    ├── SchemaError                   (RuntimeError) tables missing, old or damaged
    ├── JobNotFoundError              (LookupError)  no job has that id
    ├── QueueNotFoundError            (LookupError)  a queue that has no row, or that a Runner does not work
    ├── JobRunningError               (RuntimeError) the job is running, and what was asked needs it not to
    ├── JobFinishedError              (RuntimeError) the job is finished, and what was asked needs it not to be
    ├── UniqueKeyTakenError           (RuntimeError) another job holds the unique key that this one would take again
    ├── UncommittedJobError           (RuntimeError) wait_for a job that its own session has not committed
    ├── RunnerError                   (RuntimeError) a Runner used in a way that cannot work
    ├── TransactionOver               (RuntimeError) a transactional handler ended its transaction and went on
    ├── ForeignBindError              (RuntimeError) a transactional handler reached for another engine
    ├── WaitTimeoutError              (TimeoutError) wait_for gave up
    └── EmbeddedPostgresError         (RuntimeError) no binaries, or a server that does not start

Messages say fact, value and way out, in lower case, without a full stop. What a caller may branch on is an attribute.
"""


class RiverError(Exception):
    """Every error that sqla_river raises on purpose."""


class InvalidOptionError(RiverError, ValueError):
    """An option, name or time outside its rule."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class ArgsError(RiverError, ValueError):
    """Args that JSON, PostgreSQL or their own declared types refuse; *path* is a JSON path such as ``$.user.age``."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class EncodeError(ArgsError):
    """Args that cannot be stored."""


class DecodeError(ArgsError):
    """Stored args that do not fit the class that a handler expects."""


class UniqueNeedsEnqueueError(RiverError, TypeError):
    """``Job(args)`` with unique options."""


class SessionError(RiverError, TypeError):
    """A verb was given something that is no session or connection, or not of its colour."""


class UniqueRaceError(RiverError, RuntimeError):
    """A unique job could neither be put in nor found, twice: its holder comes and goes."""


class AsyncSessionError(SessionError):
    """A plain verb was given an AsyncSession; a call that nobody awaits must not look like a stored job."""


class WrongDatabaseError(RiverError, TypeError):
    """The session is bound to something that is not PostgreSQL."""


class MappingError(RiverError, TypeError):
    """A Job class that cannot be mapped."""


class RegistrationError(RiverError, ValueError):
    """A handler or kind that cannot be registered."""


class ConfigError(RiverError, ValueError):
    """Settings that do not go together."""


class SchemaError(RiverError, RuntimeError):
    """Tables that are missing, old or damaged."""


class JobNotFoundError(RiverError, LookupError):
    """No job has that id."""

    def __init__(self, job_id: int) -> None:
        super().__init__(f"job {job_id} does not exist; it may have been pruned or deleted")
        self.job_id = job_id


class QueueNotFoundError(RiverError, LookupError):
    """A queue that has no row, or that a Runner does not work."""

    def __init__(self, queue: str, message: str) -> None:
        super().__init__(message)
        self.queue = queue


class JobRunningError(RiverError, RuntimeError):
    """The job is running, and what was asked needs it not to."""

    def __init__(self, job_id: int, asked: str) -> None:
        super().__init__(f"job {job_id} is running and cannot be {asked}; cancel it first")
        self.job_id = job_id


class JobFinishedError(RiverError, RuntimeError):
    """The job is finished, and what was asked makes sense only before."""

    def __init__(self, job_id: int, state: str, asked: str) -> None:
        super().__init__(f"job {job_id} is {state} and cannot be {asked}; retry it first")
        self.job_id = job_id
        self.state = state


class UniqueKeyTakenError(RiverError, RuntimeError):
    """Another job, *holder_id*, holds the unique key that the job would take again."""

    def __init__(self, job_id: int, holder_id: int, asked: str) -> None:
        super().__init__(
            f"job {job_id} cannot be {asked}: job {holder_id} holds its unique key; cancel or delete that one first"
        )
        self.job_id = job_id
        self.holder_id = holder_id


class UncommittedJobError(RiverError, RuntimeError):
    """The job is not committed yet, so nobody can have started it."""

    def __init__(self, job_id: int) -> None:
        super().__init__(f"job {job_id} is not committed yet, and cannot start before it is; commit, then wait")
        self.job_id = job_id


class RunnerError(RiverError, RuntimeError):
    """A Runner used in a way that cannot work."""


class TransactionOver(RiverError, RuntimeError):  # noqa: N818 - a state of affairs, as DESIGN names it
    """A transactional handler ended its transaction and went on."""


class ForeignBindError(RiverError, RuntimeError):
    """A transactional handler reached for an engine that is not the runner's."""


class WaitTimeoutError(RiverError, TimeoutError):
    """``wait_for`` gave up before the job was finished."""


class EmbeddedPostgresError(RiverError, RuntimeError):
    """No PostgreSQL binaries, or a server that does not start."""
