"""A quantised base and its weak columns, which alone are trained: chosen, attached, stored, merged."""
