"""Text to blocks of tokens."""

from minitron.core.errors import DataError as DataError
from minitron.data.config import DataConfig as DataConfig
from minitron.data.writing import prepare as prepare
