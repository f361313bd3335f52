"""The same weights in two layouts: loss, gradients and step compared."""
