// libax_interpreter, which runners link and call nothing of. It exports nothing.
