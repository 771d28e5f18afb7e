"""The readable torch modules that a `DecoderProgram` describes, and the plain reference of every kernel op."""

from pluglm_blocks.build import OPS, build_decoder
from pluglm_blocks.context import BuildContext, OpKind
from pluglm_blocks.decoder import Decoder
from pluglm_blocks.rope import RotaryTable

__all__ = ["OPS", "BuildContext", "Decoder", "OpKind", "RotaryTable", "build_decoder"]
