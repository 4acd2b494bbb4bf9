"""Every way a training run can be refused or fail. Knows no libraries; messages are one line with the remedy.

TrainingError
├── RecipeError      a setting of the run is unknown, malformed or out of its range
├── DataError        a row or a whole file of data cannot be used
├── CheckpointError  there is a checkpoint that cannot be gone on from, or that nobody said what to do with
├── DivergedError    the loss is no number any more
├── StoppedError     somebody stopped it; it can go on
├── PublishError     the server refuses the adapter, or would refuse it
├── EvaluationError  a question is refused, or the server goes away while it is asked
├── ShortOfMemoryError  less memory is free than the run would take
├── StudyError       a study's settings are impossible, or its folder is another study's
├── ElsewhereError   another process of the run failed, and said why
└── ProcessLostError another process of the run is gone
"""


class TrainingError(Exception):
    """Base of all errors of a training run."""


class RecipeError(TrainingError):
    """A setting of the run is unknown, malformed or out of its range."""


class DataError(TrainingError):
    """A row or a whole file of data cannot be used."""


class DivergedError(TrainingError):
    """The loss is no number any more."""


class CheckpointError(TrainingError):
    """There is a checkpoint that this run cannot go on from, or that nobody said what to do with."""


class StoppedError(TrainingError):
    """The run was asked to stop, and did so with a checkpoint to go on from."""


class PublishError(TrainingError):
    """The server refuses the adapter, or would refuse it."""


class EvaluationError(TrainingError):
    """A question is refused, or the server goes away while it is asked."""


class ShortOfMemoryError(TrainingError):
    """Less memory is free than the run would take."""


class StudyError(TrainingError):
    """A study's settings are impossible, or its folder is another study's."""


class ElsewhereError(TrainingError):
    """Another process of the run failed; the message is its own."""


class ProcessLostError(TrainingError):
    """Another process of the run is gone without a word."""


class CertificateError(TrainingError):
    """A merged model cannot be compared with its live adapter."""
