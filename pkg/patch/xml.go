package patch

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// Limits of the XML of the protocol. They are far above what a patch needs.
const (
	maxXML      = 64 << 10 // bytes
	maxXMLDepth = 16
	maxXMLNodes = 4096 // elements and attributes
)

// element is one XML element. Text is its character data, joined; white space
// that stands between elements is part of it.
type element struct {
	Name     string
	Attrs    []xml.Attr
	Children []*element
	Text     string
}

// attr gives the attribute of that name, without a namespace prefix.
func (e *element) attr(name string) (string, bool) {
	for _, a := range e.Attrs {
		if a.Name.Space == "" && a.Name.Local == name {
			return a.Value, true
		}
	}
	return "", false
}

// blankText tells whether the element holds no character data but white space.
func (e *element) blankText() bool { return strings.TrimSpace(e.Text) == "" }

// parseXML reads one XML document. It refuses what the protocol has no use
// for: document types, entities beyond the five, processing instructions,
// doubled attributes, bytes that are not UTF-8, anything but white space and
// comments after the root, and more than the limits above.
func parseXML(text []byte) (*element, error) {
	if len(text) > maxXML {
		return nil, fmt.Errorf("more than %d bytes of XML", maxXML)
	}
	text = bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))
	if !utf8.Valid(text) {
		return nil, errors.New("the XML is not valid UTF-8")
	}
	text = bytes.TrimLeft(text, " \t\r\n")
	if len(text) == 0 {
		return nil, errors.New("nothing where XML was expected")
	}
	d := xml.NewDecoder(bytes.NewReader(text))
	d.CharsetReader = func(charset string, r io.Reader) (io.Reader, error) {
		if strings.EqualFold(charset, "us-ascii") {
			return r, nil
		}
		return nil, fmt.Errorf("encoding %.32q: only UTF-8 is understood", charset)
	}
	b := xmlBuilder{decoder: d}
	for {
		t, err := d.RawToken()
		if err == io.EOF {
			return b.end()
		}
		if err != nil {
			return nil, err
		}
		if err := b.token(t); err != nil {
			return nil, err
		}
	}
}

// xmlBuilder makes a tree of tokens.
type xmlBuilder struct {
	decoder *xml.Decoder
	root    *element
	stack   []*element
	nodes   int
	started bool
}

func (b *xmlBuilder) token(t xml.Token) error {
	first := !b.started
	b.started = true
	switch t := t.(type) {
	case xml.StartElement:
		return b.open(t)
	case xml.EndElement:
		return b.close(t)
	case xml.CharData:
		if len(b.stack) > 0 {
			top := b.stack[len(b.stack)-1]
			top.Text += string(t)
		} else if len(bytes.TrimSpace(t)) > 0 {
			return fmt.Errorf("text outside the root element, line %d", b.line())
		}
		return nil
	case xml.Comment:
		return nil
	case xml.ProcInst:
		if first && t.Target == "xml" {
			return nil
		}
		return fmt.Errorf("processing instruction %.32q, line %d", t.Target, b.line())
	case xml.Directive:
		return fmt.Errorf("document types are refused, line %d", b.line())
	}
	return fmt.Errorf("unexpected token %T", t)
}

func (b *xmlBuilder) open(t xml.StartElement) error {
	if b.root != nil && len(b.stack) == 0 {
		return fmt.Errorf("a second root element %.64q, line %d", t.Name.Local, b.line())
	}
	if len(b.stack) >= maxXMLDepth {
		return fmt.Errorf("elements nested deeper than %d", maxXMLDepth)
	}
	if b.nodes += 1 + len(t.Attr); b.nodes > maxXMLNodes {
		return fmt.Errorf("more than %d elements and attributes", maxXMLNodes)
	}
	seen := make(map[xml.Name]bool, len(t.Attr))
	for _, a := range t.Attr {
		if seen[a.Name] {
			return fmt.Errorf("attribute %.64q twice in element %.64q, line %d", qualified(a.Name), qualified(t.Name), b.line())
		}
		seen[a.Name] = true
	}
	e := &element{Name: qualified(t.Name), Attrs: append([]xml.Attr(nil), t.Attr...)}
	if len(b.stack) == 0 {
		b.root = e
	} else {
		top := b.stack[len(b.stack)-1]
		top.Children = append(top.Children, e)
	}
	b.stack = append(b.stack, e)
	return nil
}

func (b *xmlBuilder) close(t xml.EndElement) error {
	if len(b.stack) == 0 || b.stack[len(b.stack)-1].Name != qualified(t.Name) {
		return fmt.Errorf("end tag %.64q closes nothing, line %d", qualified(t.Name), b.line())
	}
	b.stack = b.stack[:len(b.stack)-1]
	return nil
}

func (b *xmlBuilder) end() (*element, error) {
	if b.root == nil {
		return nil, errors.New("no element in the XML")
	}
	if len(b.stack) > 0 {
		return nil, fmt.Errorf("element %.64q is not closed", b.stack[len(b.stack)-1].Name)
	}
	return b.root, nil
}

func (b *xmlBuilder) line() int {
	line, _ := b.decoder.InputPos()
	return line
}

func qualified(n xml.Name) string {
	if n.Space == "" {
		return n.Local
	}
	return n.Space + ":" + n.Local
}
