"""The search for fast kernels, and the store that never loses a measurement.

`session.py` is the loop: choose a kernel, propose candidates, measure, remember. `measure.py` is where
candidates are built and run, `store.py` what is remembered, `log.py` how it survives a kill.
"""
