package store

import (
	"strings"

	"github.com/patchd/patchd/pkg/xapi"
)

// Folders below the prefix that hold no records. A class may not be named so.
const (
	folderTouch  = "touch"
	folderGen    = "gen"
	folderTxn    = "txn"
	folderLeader = "leader"
	folderMeta   = "meta"
)

// id names one record.
type id struct {
	class string
	ref   xapi.Ref
}

// keys makes the keys of one prefix.
type keys struct{ prefix string }

func (k keys) all() string               { return k.prefix + "/" }
func (k keys) folder(name string) string { return k.prefix + "/" + name + "/" }
func (k keys) record(i id) string        { return k.prefix + "/" + i.class + "/" + string(i.ref) }
func (k keys) touch(i id) string         { return k.folder(folderTouch) + i.class + "/" + string(i.ref) }
func (k keys) gen(class string) string   { return k.folder(folderGen) + class }
func (k keys) meta(name string) string   { return k.folder(folderMeta) + name }
func (k keys) txn(name string) string    { return k.folder(folderTxn) + name }
func (k keys) leaders() string           { return k.prefix + "/" + folderLeader }
func (k keys) split(key string) (folder, rest string) {
	folder, rest, _ = strings.Cut(strings.TrimPrefix(key, k.all()), "/")
	return folder, rest
}

// splitID reads "<class>/<ref>".
func splitID(rest string) (id, bool) {
	class, ref, ok := strings.Cut(rest, "/")
	return id{class, xapi.Ref(ref)}, ok
}

func validClass(class string) bool {
	switch class {
	case "", folderTouch, folderGen, folderTxn, folderLeader, folderMeta:
		return false
	}
	return validName(class, 64)
}

func validRef(ref xapi.Ref) bool { return !ref.IsNull() && validName(string(ref), 256) }

// validName tells whether s is one element of a key: printable ASCII, no slash.
func validName(s string, limit int) bool {
	if s == "" || len(s) > limit {
		return false
	}
	for i := 0; i < len(s); i++ {
		if s[i] <= ' ' || s[i] > '~' || s[i] == '/' {
			return false
		}
	}
	return true
}
