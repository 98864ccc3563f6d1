"""The samplers of published few-step students, by name."""

from flashdiff.samplers.base import SamplerKind
from flashdiff.samplers.consistency import LCM
from flashdiff.samplers.ddim import DDIM
from flashdiff.samplers.euler import EULER, EULER_ANCESTRAL
from flashdiff.samplers.flow import FLOW_EULER
from flashdiff.samplers.tcd import TCD
from flashdiff.samplers.trigonometric import SCM

SAMPLERS: dict[str, SamplerKind] = {kind.name: kind for kind in (LCM, EULER, EULER_ANCESTRAL, DDIM, TCD, FLOW_EULER, SCM)}
