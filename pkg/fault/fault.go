// Package fault names the places where patchd can die. Every effect on the
// operating system, every write to the store and every call of a storage
// driver passes a point before and after it; a test builds patchd with the tag
// "faults" and lets the process die, or the effect fail, at point n.
//
// Without that tag Point is an empty function that the compiler removes:
// nothing in a release can be switched on.
package fault
