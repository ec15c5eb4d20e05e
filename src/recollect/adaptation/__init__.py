"""Local adaptation: how a head's parameters are fitted to one query's neighbors."""

from recollect.adaptation import rules
from recollect.adaptation.head import Head
from recollect.adaptation.local import Adaptation, LocalAdaptation

__all__ = ["Adaptation", "Head", "LocalAdaptation", "rules"]
