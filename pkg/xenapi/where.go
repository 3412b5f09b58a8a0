package xenapi

import (
	"fmt"
	"strconv"
	"strings"
)

// expr is a parsed get_all_records_where expression:
//
//	expr    = conj { "or" conj }
//	conj    = unary { "and" unary }
//	unary   = "not" unary | "(" expr ")" | "true" | "false" | operand "=" operand
//	operand = "field" string | string
//
// Strings are quoted with " or '; a backslash takes the next character as it
// is. Comparing is of the text a field has on the wire: "true", "42",
// "OpaqueRef:…"; the pseudo-field _ref is the object's own reference.
type expr interface {
	eval(rec map[string]any) (bool, error)
}

type (
	constExpr bool
	notExpr   struct{ of expr }
	andExpr   struct{ left, right expr }
	orExpr    struct{ left, right expr }
	equalExpr struct{ left, right operand }
)

// operand is a field's name or a literal.
type operand struct {
	field bool
	text  string
}

// whereDepth bounds parentheses and chains of "not".
const whereDepth = 64

// whereTerms bounds how much one expression may make the server compare.
const whereTerms = 1000

// parseWhere reads an expression that covers all of s.
func parseWhere(s string) (expr, error) {
	p := &whereParser{rest: s}
	e, err := p.disjunction(0)
	if err != nil {
		return nil, err
	}
	p.skipSpace()
	if p.rest != "" {
		return nil, fmt.Errorf("unexpected %.20q", p.rest)
	}
	return e, nil
}

func (e constExpr) eval(map[string]any) (bool, error) { return bool(e), nil }

func (e notExpr) eval(rec map[string]any) (bool, error) {
	v, err := e.of.eval(rec)
	return !v, err
}

func (e andExpr) eval(rec map[string]any) (bool, error) {
	if v, err := e.left.eval(rec); err != nil || !v {
		return false, err
	}
	return e.right.eval(rec)
}

func (e orExpr) eval(rec map[string]any) (bool, error) {
	if v, err := e.left.eval(rec); err != nil || v {
		return v, err
	}
	return e.right.eval(rec)
}

func (e equalExpr) eval(rec map[string]any) (bool, error) {
	l, err := e.left.value(rec)
	if err != nil {
		return false, err
	}
	r, err := e.right.value(rec)
	return l == r, err
}

func (o operand) value(rec map[string]any) (string, error) {
	if !o.field {
		return o.text, nil
	}
	v, ok := rec[o.text]
	if !ok {
		return "", fmt.Errorf("no field %.64q", o.text)
	}
	return plainText(v), nil
}

// fields gives the names of the fields an expression asks for.
func fields(e expr, visit func(string)) {
	switch e := e.(type) {
	case notExpr:
		fields(e.of, visit)
	case andExpr:
		fields(e.left, visit)
		fields(e.right, visit)
	case orExpr:
		fields(e.left, visit)
		fields(e.right, visit)
	case equalExpr:
		for _, o := range []operand{e.left, e.right} {
			if o.field {
				visit(o.text)
			}
		}
	}
}

// plainText is a value as one text; sets and maps in the form a classic
// database kept them.
func plainText(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case Date:
		return string(v)
	case bool:
		return strconv.FormatBool(v)
	case float64:
		return strconv.FormatFloat(v, 'g', 16, 64)
	case []any:
		parts := make([]string, len(v))
		for i, e := range v {
			parts[i] = "'" + plainText(e) + "'"
		}
		return "(" + strings.Join(parts, " ") + ")"
	case map[string]any:
		parts := make([]string, 0, len(v))
		for _, k := range sortedKeys(v) {
			parts = append(parts, "('"+k+"' '"+plainText(v[k])+"')")
		}
		return "(" + strings.Join(parts, " ") + ")"
	}
	return fmt.Sprint(v)
}

type whereParser struct {
	rest  string
	terms int
}

func (p *whereParser) skipSpace() { p.rest = strings.TrimLeft(p.rest, " \t\r\n") }

// word takes w if it is the next word.
func (p *whereParser) word(w string) bool {
	p.skipSpace()
	rest, ok := strings.CutPrefix(p.rest, w)
	if !ok || rest != "" && isLetter(rest[0]) {
		return false
	}
	p.rest = rest
	return true
}

func isLetter(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_'
}

func (p *whereParser) symbol(c byte) bool {
	p.skipSpace()
	if p.rest == "" || p.rest[0] != c {
		return false
	}
	p.rest = p.rest[1:]
	return true
}

func (p *whereParser) disjunction(depth int) (expr, error) {
	left, err := p.conjunction(depth)
	for err == nil && p.word("or") {
		var right expr
		if right, err = p.conjunction(depth); err == nil {
			left = orExpr{left, right}
		}
	}
	return left, err
}

func (p *whereParser) conjunction(depth int) (expr, error) {
	left, err := p.unary(depth)
	for err == nil && p.word("and") {
		var right expr
		if right, err = p.unary(depth); err == nil {
			left = andExpr{left, right}
		}
	}
	return left, err
}

func (p *whereParser) unary(depth int) (expr, error) {
	p.terms++
	if depth > whereDepth || p.terms > whereTerms {
		return nil, fmt.Errorf("the expression is too large")
	}
	switch {
	case p.word("not"):
		e, err := p.unary(depth + 1)
		return notExpr{e}, err
	case p.word("true"):
		return constExpr(true), nil
	case p.word("false"):
		return constExpr(false), nil
	case p.symbol('('):
		e, err := p.disjunction(depth + 1)
		if err == nil && !p.symbol(')') {
			err = fmt.Errorf("a parenthesis is not closed")
		}
		return e, err
	}
	left, err := p.operand()
	if err != nil {
		return nil, err
	}
	if !p.symbol('=') {
		return nil, fmt.Errorf("expected = at %.20q", p.rest)
	}
	right, err := p.operand()
	return equalExpr{left, right}, err
}

func (p *whereParser) operand() (operand, error) {
	field := p.word("field")
	text, err := p.quoted()
	return operand{field: field, text: text}, err
}

func (p *whereParser) quoted() (string, error) {
	p.skipSpace()
	if p.rest == "" || p.rest[0] != '"' && p.rest[0] != '\'' {
		return "", fmt.Errorf("expected a quoted text at %.20q", p.rest)
	}
	quote := p.rest[0]
	var b strings.Builder
	for i := 1; i < len(p.rest); i++ {
		switch c := p.rest[i]; c {
		case quote:
			p.rest = p.rest[i+1:]
			return b.String(), nil
		case '\\':
			i++
			if i < len(p.rest) {
				b.WriteByte(p.rest[i])
			}
		default:
			b.WriteByte(c)
		}
	}
	return "", fmt.Errorf("a quoted text does not end")
}
