"""The two engines, data-parallel and pipeline × tensor, behind one protocol."""
