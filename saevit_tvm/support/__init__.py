"""What every room may use and that knows neither models nor TVM: errors, folders, processes, this CPU, compilers."""
