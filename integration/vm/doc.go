// Package vm holds the tests that need a kernel of their own: the storage
// drivers nfs and lvm, alone and below the real daemon. `make test-vm` builds
// them, starts a virtual machine and runs them in it; they have the build tag vm.
package vm
