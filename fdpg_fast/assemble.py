"""From config to features and target."""

from __future__ import annotations

from dataclasses import replace

from . import config as c
from .errors import UserError
from .features import Feature, classifier, import_feature, pep8, python_parses, regex, word
from .features.feature import import_object
from .metrics import RESERVED
from .targets import Target, distributional, pointwise, rlhf


def build_feature(config: c.FeatureConfig, device: str) -> Feature:
    """The feature that a config section describes."""
    match config:
        case c.WordFeature():
            feature = word(config.word)
        case c.RegexFeature():
            feature = regex(config.pattern)
        case c.PythonParsesFeature():
            feature = python_parses()
        case c.Pep8Feature():
            feature = pep8()
        case c.ClassifierFeature():
            feature = classifier(
                config.model,
                config.label,
                batch_size=config.batch_size,
                with_prompt=config.with_prompt,
                device=device,
            )
        case c.ImportedFeature():
            feature = import_feature(config.path)
    return replace(feature, name=config.name or feature.name, timeout=config.timeout or feature.timeout)


def build_target(config: c.TrainConfig, device: str) -> Target:
    """The product of the config's terms.

    Raises:
        UserError: a feature or target cannot be made, or two features share a name.
    """
    target = Target(())
    for term in config.target:
        match term:
            case c.PointwiseTerm():
                target *= pointwise(build_feature(term.feature, device))
            case c.RLHFTerm():
                target *= rlhf(build_feature(term.feature, device), term.beta)
            case c.DistributionalTerm():
                target *= distributional([build_feature(f, device) for f in term.features], term.moments)
            case c.ImportedTarget():
                target *= _imported(term.path)
    names = [feature.name for feature in target.features]
    for name in names:
        if name in RESERVED:
            raise UserError(f"target: {name!r} is the name of a metric of its own; give the feature another name")
        if names.count(name) > 1:
            raise UserError(f"target: two features are called {name!r}; give one of them another name")
    return target


def _imported(path: str) -> Target:
    found = import_object(path)
    if callable(found) and not isinstance(found, Target):
        try:
            found = found()
        except Exception as error:  # the user's code
            message = " ".join(str(error).split())
            raise UserError(f"target: {path!r} raised {type(error).__name__}: {message}") from error
    if not isinstance(found, Target):
        raise UserError(f"target: {path!r} is a {type(found).__name__}, not a Target or a function that makes one")
    return found
