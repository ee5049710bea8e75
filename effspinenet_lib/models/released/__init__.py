"""From a checkpoint of the TensorFlow Model Garden to a weights file of this library."""
