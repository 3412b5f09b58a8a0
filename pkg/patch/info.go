package patch

import (
	"encoding/xml"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/patchd/patchd/pkg/xapi"
)

// Bounds of the texts in `info`, in characters.
const (
	maxLabel       = 256
	maxDescription = 4096
	maxVersion     = 64
	maxGuidance    = 32       // words
	maxScratch     = 64 << 40 // bytes
)

// Info is what a patch says about itself: the answer to `info`.
type Info struct {
	UUID            xapi.UUID
	Version         string // at most 64 characters, may be empty
	NameLabel       string // 1 to 256 characters, one line
	NameDescription string // at most 4096 characters, one line, may be empty
	// Guidance holds each of the four words at most once; the newer words of
	// S1-35 are mapped to them.
	Guidance []xapi.Guidance
	// ScratchSize is the room in bytes that precheck and apply may use beside
	// the payload (PATCHD_SCRATCH). 0: not said.
	ScratchSize int64
	// XML is the text as the patch printed it: the content of a stampfile.
	XML string
}

// ParseInfo reads the XML that `info` prints: one element `info` with the five
// mandatory attributes uuid, version, name-label, name-description and
// after-apply-guidance, and the optional scratch-size (bytes). Other attributes
// and children are ignored (S1-34, S1-35; xenapi classic pool_patch).
//
// Errors: INVALID_PATCH [text].
func ParseInfo(text []byte) (Info, error) {
	i, err := parseInfo(text)
	if err != nil {
		return Info{}, xapi.NewError(xapi.InvalidPatch, "info: "+err.Error()).Because(err)
	}
	return i, nil
}

func parseInfo(text []byte) (Info, error) {
	root, err := parseXML(text)
	if err != nil {
		return Info{}, err
	}
	if root.Name != "info" {
		return Info{}, fmt.Errorf("the root element is %.64q and not \"info\"", root.Name)
	}
	i := Info{XML: string(text)}
	uuid, err := infoText(root, "uuid", 0, 64)
	if err != nil {
		return Info{}, err
	}
	if i.UUID, err = xapi.ParseUUID(strings.TrimSpace(uuid)); err != nil {
		return Info{}, fmt.Errorf("uuid: %w", err)
	}
	if i.Version, err = infoText(root, "version", 0, maxVersion); err != nil {
		return Info{}, err
	}
	if i.NameLabel, err = infoText(root, "name-label", 1, maxLabel); err != nil {
		return Info{}, err
	}
	if i.NameDescription, err = infoText(root, "name-description", 0, maxDescription); err != nil {
		return Info{}, err
	}
	guidance, err := infoText(root, "after-apply-guidance", 0, 4096)
	if err != nil {
		return Info{}, err
	}
	words := strings.Fields(guidance)
	if len(words) > maxGuidance {
		return Info{}, fmt.Errorf("after-apply-guidance has more than %d words", maxGuidance)
	}
	if i.Guidance, err = xapi.ParseGuidance(words); err != nil {
		return Info{}, err
	}
	i.ScratchSize, err = scratchAttr(root)
	return i, err
}

func scratchAttr(root *element) (int64, error) {
	s, ok := root.attr("scratch-size")
	if !ok {
		return 0, nil
	}
	n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 63)
	if err != nil {
		return 0, fmt.Errorf("scratch-size %.32q is not a number of bytes", s)
	}
	if n > maxScratch {
		return 0, fmt.Errorf("scratch-size %d is more than %d bytes", n, int64(maxScratch))
	}
	return int64(n), nil
}

// infoText gives a mandatory attribute within its bounds.
func infoText(root *element, name string, least, most int) (string, error) {
	s, ok := root.attr(name)
	if !ok {
		return "", fmt.Errorf("attribute %q is missing", name)
	}
	// As every XML reader does with attributes: a line break is a blank.
	s = strings.NewReplacer("\r\n", " ", "\n", " ", "\r", " ", "\t", " ").Replace(s)
	if err := checkText(s, least, most); err != nil {
		return "", fmt.Errorf("attribute %q %w", name, err)
	}
	return s, nil
}

// checkText refuses texts out of bounds, control characters, and the
// characters that turn the direction of writing: they would let a label look
// like another.
func checkText(s string, least, most int) error {
	if !utf8.ValidString(s) {
		return fmt.Errorf("is not valid UTF-8")
	}
	if n := utf8.RuneCountInString(s); n < least || n > most {
		return fmt.Errorf("has %d characters: %d to %d are allowed", n, least, most)
	}
	for _, r := range s {
		if unicode.IsControl(r) || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			return fmt.Errorf("holds the control character %U", r)
		}
	}
	return nil
}

// Encode writes the XML that ParseInfo reads, as one line without a line feed.
// UUID, Guidance and the bounds of the texts are not checked here.
func (i Info) Encode() string {
	words := make([]string, len(i.Guidance))
	for n, g := range i.Guidance {
		words[n] = string(g)
	}
	return encodeInfo(i, words)
}

func encodeInfo(i Info, guidance []string) string {
	var b strings.Builder
	put := func(name, value string) {
		b.WriteString(" " + name + `="`)
		xml.EscapeText(&b, []byte(value)) // writes to a strings.Builder do not fail
		b.WriteString(`"`)
	}
	b.WriteString("<info")
	put("uuid", string(i.UUID))
	put("version", i.Version)
	put("name-label", i.NameLabel)
	put("name-description", i.NameDescription)
	put("after-apply-guidance", strings.Join(guidance, " "))
	if i.ScratchSize > 0 {
		put("scratch-size", strconv.FormatInt(i.ScratchSize, 10))
	}
	b.WriteString("/>")
	return b.String()
}
