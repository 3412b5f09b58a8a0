package patch

import (
	"reflect"
	"strings"
	"testing"

	"github.com/patchd/patchd/pkg/xapi"
)

const goodInfo = `<info uuid="0A1B2C3D-0000-4000-8000-00000000000f" version="1.0" name-label="XS1" name-description="Fixes &lt;it&gt; &amp; more" after-apply-guidance="restartHVM restartHost"/>`

func TestParseInfo_S1_34(t *testing.T) {
	want := Info{
		UUID: "0a1b2c3d-0000-4000-8000-00000000000f", Version: "1.0", NameLabel: "XS1",
		NameDescription: "Fixes <it> & more", Guidance: []xapi.Guidance{xapi.RestartHVM, xapi.RestartHost},
	}
	for name, text := range map[string]string{
		"plain":                      goodInfo,
		"with declaration":           `<?xml version="1.0" encoding="UTF-8"?>` + "\n" + goodInfo + "\n",
		"ascii":                      `<?xml version="1.0" encoding="us-ascii"?>` + goodInfo,
		"byte order mark":            "\xef\xbb\xbf" + goodInfo,
		"white space and comments":   "\n <!-- a -->" + goodInfo + "\n<!-- b -->\n\n",
		"other attributes, children": strings.Replace(goodInfo, "/>", ` more="x" p:uuid="y"><child uuid="z"/>text</info>`, 1),
		"single quotes":              strings.ReplaceAll(goodInfo, `"`, `'`),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseInfo([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			want := want
			want.XML = text
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got %+v\nwant %+v", got, want)
			}
		})
	}
}

func TestParseInfoScratchSize(t *testing.T) {
	i, err := ParseInfo([]byte(strings.Replace(goodInfo, "/>", ` scratch-size="1073741824"/>`, 1)))
	if err != nil || i.ScratchSize != 1<<30 {
		t.Fatal(i.ScratchSize, err)
	}
	for _, bad := range []string{"-1", "1 GiB", "", "99999999999999999999", "9223372036854775807"} {
		if _, err := ParseInfo([]byte(strings.Replace(goodInfo, "/>", ` scratch-size="`+bad+`"/>`, 1))); !xapi.Is(err, xapi.InvalidPatch) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestParseInfoGuidance_S1_35(t *testing.T) {
	for words, want := range map[string][]xapi.Guidance{
		"":                             {},
		" \n ":                         {},
		"restartXAPI  restartXAPI":     {xapi.RestartXAPI},
		"RebootHost RestartToolstack":  {xapi.RestartHost, xapi.RestartXAPI},
		"EvacuateHost":                 {xapi.RestartHost},
		"RestartVM":                    {xapi.RestartHVM, xapi.RestartPV},
		"RebootHostOnLivePatchFailure": {xapi.RestartHost},
	} {
		i, err := ParseInfo([]byte(strings.Replace(goodInfo, "restartHVM restartHost", words, 1)))
		if err != nil || !reflect.DeepEqual(i.Guidance, want) {
			t.Errorf("%q: %v, %v", words, i.Guidance, err)
		}
	}
	_, err := ParseInfo([]byte(strings.Replace(goodInfo, "restartHVM", "restartWorld", 1)))
	if !xapi.Is(err, xapi.InvalidPatch) || !strings.Contains(err.Error(), "restartWorld") {
		t.Error(err)
	}
}

func TestParseInfoRefuses_S1_34(t *testing.T) {
	cut := func(attr string) string {
		at := strings.Index(goodInfo, " "+attr+`="`)
		end := at + len(attr) + 3 + strings.Index(goodInfo[at+len(attr)+3:], `"`) + 1
		return goodInfo[:at] + goodInfo[end:]
	}
	cases := map[string]string{
		"nothing":               "",
		"white space":           " \n",
		"not XML":               "hello",
		"other root":            strings.Replace(goodInfo, "<info", "<inf", 1),
		"prefixed root":         strings.Replace(goodInfo, "<info", "<x:info", 1),
		"not closed":            strings.Replace(goodInfo, "/>", ">", 1),
		"wrong end":             strings.Replace(goodInfo, "/>", "></inf>", 1),
		"doubled attribute":     strings.Replace(goodInfo, "/>", ` version="2"/>`, 1),
		"doubled element":       goodInfo + goodInfo,
		"trailing text":         goodInfo + "x",
		"leading text":          "x" + goodInfo,
		"document type":         `<!DOCTYPE info [<!ENTITY a "b">]>` + goodInfo,
		"entity":                strings.Replace(goodInfo, "XS1", "&xs;", 1),
		"instruction":           goodInfo + "<?php ?>",
		"late declaration":      goodInfo + `<?xml version="1.0"?>`,
		"other encoding":        `<?xml version="1.0" encoding="UTF-16"?>` + goodInfo,
		"not UTF-8":             strings.Replace(goodInfo, "XS1", "\xff", 1),
		"NUL":                   strings.Replace(goodInfo, "XS1", "a\x00b", 1),
		"NUL reference":         strings.Replace(goodInfo, "XS1", "a&#0;b", 1),
		"control character":     strings.Replace(goodInfo, "XS1", "a&#x85;b", 1),
		"writing direction":     strings.Replace(goodInfo, "XS1", "a\u202eb", 1),
		"empty label":           strings.Replace(goodInfo, "XS1", "", 1),
		"long label":            strings.Replace(goodInfo, "XS1", strings.Repeat("x", 257), 1),
		"long version":          strings.Replace(goodInfo, "1.0", strings.Repeat("1", 65), 1),
		"long description":      strings.Replace(goodInfo, "Fixes", strings.Repeat("x", 4097), 1),
		"huge":                  strings.Replace(goodInfo, "/>", ">"+strings.Repeat(" ", 64<<10)+"</info>", 1),
		"deep":                  strings.Replace(goodInfo, "/>", ">"+strings.Repeat("<a>", 20)+strings.Repeat("</a>", 20)+"</info>", 1),
		"wide":                  strings.Replace(goodInfo, "/>", ">"+strings.Repeat("<a/>", 5000)+"</info>", 1),
		"bad uuid":              strings.Replace(goodInfo, "0A1B", "../..", 1),
		"many words":            strings.Replace(goodInfo, "restartHVM", strings.Repeat("restartHVM ", 40), 1),
		"unquoted":              strings.Replace(goodInfo, `"XS1"`, "XS1", 1),
		"uuid missing":          cut("uuid"),
		"version missing":       cut("version"),
		"label missing":         cut("name-label"),
		"description missing":   cut("name-description"),
		"guidance missing":      cut("after-apply-guidance"),
		"only a prefixed label": strings.Replace(goodInfo, "name-label", "x:name-label", 1),
	}
	for name, text := range cases {
		t.Run(name, func(t *testing.T) {
			i, err := ParseInfo([]byte(text))
			e := xapi.AsError(err)
			if err == nil || e.Code != xapi.InvalidPatch || len(e.Params) != 1 || len(e.Params[0]) < 10 {
				t.Errorf("%+v, %v", i, err)
			}
		})
	}
}

func TestInfoLineBreaksInAttributes(t *testing.T) {
	i, err := ParseInfo([]byte(strings.Replace(goodInfo, "Fixes", "Fixes\r\n\tall", 1)))
	if err != nil || i.NameDescription != "Fixes  all <it> & more" {
		t.Fatalf("%q, %v", i.NameDescription, err)
	}
}

func TestInfoEncodes(t *testing.T) {
	want := Info{
		UUID: "0a1b2c3d-0000-4000-8000-00000000000f", Version: `1"'`, NameLabel: `<a> & 'b' "c" é`, NameDescription: "",
		Guidance: []xapi.Guidance{xapi.RestartPV, xapi.RestartXAPI}, ScratchSize: 5,
	}
	want.XML = want.Encode()
	got, err := ParseInfo([]byte(want.XML))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v", got, err)
	}
}
