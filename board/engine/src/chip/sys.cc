// The AX650's libax_sys has no symbols beyond those of src/abi_sys.cc.
