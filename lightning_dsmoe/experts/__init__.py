"""Expert networks, the plain feed-forward layer and the mixture of experts."""

from lightning_dsmoe.experts.experts import Experts as Experts
from lightning_dsmoe.experts.experts import GLUExperts as GLUExperts
from lightning_dsmoe.experts.experts import MLPExperts as MLPExperts
from lightning_dsmoe.experts.feed_forward import FeedForward as FeedForward
from lightning_dsmoe.experts.feed_forward import FeedForwardLayer as FeedForwardLayer
from lightning_dsmoe.experts.mixture import MixtureOfExperts as MixtureOfExperts
