"""Prints what an installed package requires here, one a line, without those named after it."""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

package, *left_out = sys.argv[1:]
for requirement in map(Requirement, requires(package) or []):
    here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if here and requirement.name not in left_out:
        print(requirement)
