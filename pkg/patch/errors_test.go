package patch

import (
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/xapi"
)

const ref = "OpaqueRef:11111111-2222-4333-8444-555555555555"

func description(err error) []string {
	if err == nil {
		return nil
	}
	return xapi.AsError(err).Description()
}

func TestPrecheckError_S1_36(t *testing.T) {
	xml := func(code, children string) string {
		return `<?xml version="1.0"?>` + "\n<error errorcode=\"" + code + "\">\n\t" + children + "\n</error>\n"
	}
	for name, c := range map[string]struct {
		stdout string
		want   []string
	}{
		"unknown error":    {xml("PATCH_PRECHECK_FAILED_UNKNOWN_ERROR", "<info> it is broken </info>"), []string{"PATCH_PRECHECK_FAILED_UNKNOWN_ERROR", ref, "it is broken"}},
		"empty info":       {xml("PATCH_PRECHECK_FAILED_UNKNOWN_ERROR", "<info/>"), []string{"PATCH_PRECHECK_FAILED_UNKNOWN_ERROR", ref, ""}},
		"ISO mounted":      {xml("PATCH_PRECHECK_FAILED_ISO_MOUNTED", "<info>tools</info>"), []string{"PATCH_PRECHECK_FAILED_ISO_MOUNTED", ref, "tools"}},
		"one prerequisite": {xml("PATCH_PRECHECK_FAILED_PREREQUISITE_MISSING", `<prerequisite uuid="u1"/>`), []string{"PATCH_PRECHECK_FAILED_PREREQUISITE_MISSING", ref, "u1"}},
		"prerequisites":    {xml("PATCH_PRECHECK_FAILED_PREREQUISITE_MISSING", `<prerequisite uuid="u1"/><prerequisite uuid="u2">x</prerequisite>`), []string{"PATCH_PRECHECK_FAILED_PREREQUISITE_MISSING", ref, "u1;u2"}},
		"wrong version":    {xml("PATCH_PRECHECK_FAILED_WRONG_SERVER_VERSION", "<found>7.0</found><required>7.1</required>"), []string{"PATCH_PRECHECK_FAILED_WRONG_SERVER_VERSION", ref, "7.0", "7.1"}},
		"wrong build":      {xml("PATCH_PRECHECK_FAILED_WRONG_SERVER_BUILD", "<required>^12.*</required><found>11p</found>"), []string{"PATCH_PRECHECK_FAILED_WRONG_SERVER_BUILD", ref, "11p", "^12.*"}},
		"VM running":       {xml("PATCH_PRECHECK_FAILED_VM_RUNNING", ""), []string{"PATCH_PRECHECK_FAILED_VM_RUNNING", ref}},
		"out of space":     {xml("PATCH_PRECHECK_FAILED_OUT_OF_SPACE", "<found>10</found><required>20</required>"), []string{"PATCH_PRECHECK_FAILED_OUT_OF_SPACE", ref, "10", "20"}},
		"conflict":         {xml("PATCH_PRECHECK_FAILED_CONFLICT_PRESENT", `<conflict uuid="u1"/><conflict uuid="u2"/>`), []string{"PATCH_PRECHECK_FAILED_CONFLICT_PRESENT", ref, "u1;u2"}},
		"GPG key missing":  {xml("PATCH_PRECHECK_FAILED_GPGKEY_NOT_IMPORTED", ""), []string{"PATCH_PRECHECK_FAILED_GPGKEY_NOT_IMPORTED", ref}},
		"licence":          {xml("LICENCE_RESTRICTION", "<feature>hotfix_apply</feature>"), []string{"LICENCE_RESTRICTION", "hotfix_apply"}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := description(PrecheckError(ref, 1, c.stdout, "noise "+c.stdout)); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %q\nwant %q", got, c.want)
			}
		})
	}
	for name, stdout := range map[string]string{
		"nothing":               "",
		"text":                  "it did not work",
		"other root":            `<errors errorcode="PATCH_PRECHECK_FAILED_VM_RUNNING"/>`,
		"no code":               `<error/>`,
		"unknown code":          xml("PATCH_PRECHECK_FAILED_MOOD", ""),
		"code of something":     xml("INTERNAL_ERROR", ""),
		"extra attribute":       `<error errorcode="PATCH_PRECHECK_FAILED_VM_RUNNING" more="x"/>`,
		"mixed text":            xml("PATCH_PRECHECK_FAILED_UNKNOWN_ERROR", "text<info>a</info>"),
		"two infos":             xml("PATCH_PRECHECK_FAILED_UNKNOWN_ERROR", "<info>a</info><info>b</info>"),
		"no info":               xml("PATCH_PRECHECK_FAILED_ISO_MOUNTED", ""),
		"info with an element":  xml("PATCH_PRECHECK_FAILED_ISO_MOUNTED", "<info>a<b/></info>"),
		"no prerequisite":       xml("PATCH_PRECHECK_FAILED_PREREQUISITE_MISSING", ""),
		"prerequisite no uuid":  xml("PATCH_PRECHECK_FAILED_PREREQUISITE_MISSING", "<prerequisite/>"),
		"other child":           xml("PATCH_PRECHECK_FAILED_PREREQUISITE_MISSING", `<prerequisite uuid="a"/><x uuid="b"/>`),
		"required missing":      xml("PATCH_PRECHECK_FAILED_WRONG_SERVER_VERSION", "<found>a</found>"),
		"found twice":           xml("PATCH_PRECHECK_FAILED_OUT_OF_SPACE", "<found>a</found><found>a</found>"),
		"unwanted child":        xml("PATCH_PRECHECK_FAILED_VM_RUNNING", "<info>a</info>"),
		"output before":         "checking\n" + xml("PATCH_PRECHECK_FAILED_VM_RUNNING", ""),
		"output after":          xml("PATCH_PRECHECK_FAILED_VM_RUNNING", "") + "bye",
		"two documents":         xml("PATCH_PRECHECK_FAILED_VM_RUNNING", "") + `<error errorcode="x"/>`,
		"more than is readable": xml("PATCH_PRECHECK_FAILED_UNKNOWN_ERROR", "<info>"+strings.Repeat("a", 70000)+"</info>"),
	} {
		t.Run("malformed: "+name, func(t *testing.T) {
			got := description(PrecheckError(ref, 1, stdout, stdout+"\x00the end"))
			if len(got) != 2 || got[0] != xapi.InvalidPatchWithLog || !strings.HasPrefix(got[1], "Unknown error code or malformed xml") {
				t.Fatalf("%.300q", got)
			}
			if !strings.Contains(got[1], "the end") || strings.Contains(got[1], "\x00") || len(got[1]) > MaxOutput+4096 {
				t.Errorf("output: %.300q", got[1])
			}
		})
	}
}

func TestPrecheckOtherExits_S1_36(t *testing.T) {
	if err := PrecheckError(ref, 0, "x", "x"); err != nil {
		t.Error(err)
	}
	for _, exit := range []int{2, 3, 127, -1} {
		got := description(PrecheckError(ref, exit, "<error/>", "both\n"))
		want := []string{xapi.PrecheckFailedUnknownError, ref, "Error running prechecks on patch " + ref + ": both"}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%d: %q", exit, got)
		}
	}
}

func TestApplyError(t *testing.T) {
	backup := `<error errorcode="PATCH_PRECHECK_FAILED_UNKNOWN_ERROR"><info>Backup files already present in /x</info></error>`
	for name, c := range map[string]struct {
		exit   int
		output string
		want   []string
	}{
		"done":             {0, backup, nil},
		"failed":           {3, "no\n", []string{"PATCH_APPLY_FAILED", "no"}},
		"silent":           {3, "", []string{"PATCH_APPLY_FAILED", "apply ended with exit status 3"}},
		"killed":           {-1, "", []string{"PATCH_APPLY_FAILED", "apply was ended by a signal"}},
		"backup":           {1, backup, []string{"PATCH_APPLY_FAILED_BACKUP_FILES_EXIST", "Backup files already present in /x"}},
		"backup as text":   {1, "Backup files already present", []string{"PATCH_APPLY_FAILED", "Backup files already present"}},
		"backup elsewhere": {1, strings.Replace(backup, "UNKNOWN_ERROR", "ISO_MOUNTED", 1), []string{"PATCH_APPLY_FAILED", strings.Replace(backup, "UNKNOWN_ERROR", "ISO_MOUNTED", 1)}},
		"other error XML":  {1, strings.Replace(backup, "Backup", "No backup", 1), []string{"PATCH_APPLY_FAILED", strings.Replace(backup, "Backup", "No backup", 1)}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := description(ApplyError(c.exit, c.output)); !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %q\nwant %q", got, c.want)
			}
		})
	}
}

func TestInfoError(t *testing.T) {
	if err := InfoError(0, ""); err != nil {
		t.Error(err)
	}
	if got := description(InfoError(2, "sh: \r not found")); !reflect.DeepEqual(got, []string{"INVALID_PATCH_WITH_LOG", "Bad line endings?"}) {
		t.Error(got)
	}
	for _, exit := range []int{1, 126, 127, -1} {
		if got := description(InfoError(exit, "why")); got[0] != "INVALID_PATCH" || !strings.HasSuffix(got[1], ": why") {
			t.Error(got)
		}
	}
}

func TestTail(t *testing.T) {
	for name, in := range map[string]string{
		"short":   "abc",
		"long":    strings.Repeat("é", MaxOutput),
		"invalid": strings.Repeat("\xff\xfe", MaxOutput),
		"NULs":    strings.Repeat("\x00", MaxOutput*2),
		"mixed":   strings.Repeat("\x00é\xff", MaxOutput),
	} {
		got := Tail(in)
		if !utf8.ValidString(got) || len(got) > MaxOutput+3 || strings.Contains(got, "\x00") {
			t.Errorf("%s: %d bytes", name, len(got))
		}
	}
	if got := Tail("a\x00b\n\n"); got != "ab" {
		t.Errorf("%q", got)
	}
}
