"""Features: what is asked of a text, as functions over a batch of completions.

A feature has the signature of a TRL reward function, `fn(completions, prompts=…, **columns) -> list[float | None]`,
sync or async; None means that it does not apply to that completion.
"""

from .code import pep8 as pep8
from .code import python_parses as python_parses
from .completions import Completions as Completions
from .entities import entities as entities
from .feature import Feature as Feature
from .feature import check_columns as check_columns
from .feature import feature as feature
from .feature import import_feature as import_feature
from .feature import started as started
from .remote import http as http
from .remote import retried as retried
from .text import classifier as classifier
from .text import regex as regex
from .text import sentiment as sentiment
from .text import word as word
