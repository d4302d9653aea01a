"""Shows, by one step of a narrow copy, that a layout trains as one device would: gradients, loss, norm, update."""
