// Package lab is what the whole-system tests work with: the real patchd as a
// process of its own on a state directory of the test's, real signatures by
// gpg, patches made of shell scripts, and a check that nothing is left when
// the test ends. For pools: networks of namespaces whose links can be cut and
// narrowed, proxies that fail as networks do, a cluster of etcd, and patches
// whose effects are counted on each host.
package lab
