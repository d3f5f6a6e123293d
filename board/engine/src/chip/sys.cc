// An AX650's libax_sys has nothing that src/abi_sys.cc has not.
