// Colors for code: a few regular expressions for each group of languages. Not a parser: what it does
// not know stays plain. `paint` continues where the last call ended, so that code can stream.

const MOST_CHARACTERS = 200_000; // of code with colors

const words = (text) => new Set(text.split(" "));
const LINE = { slashes: /\/\/[^\n]*/, hash: /(?<![^\s;(])#[^\n]*/, dashes: /--[^\n]*/, semicolon: /;[^\n]*/, percent: /%[^\n]*/ };
const BLOCK = /\/\*[^]*?(?:\*\/|(?![^]))/;
const DOUBLE = /"(?:\\[^]|[^"\\\n])*"?/;
const SINGLE = /'(?:\\[^]|[^'\\\n])*'?/;
const CHARACTER = /'(?:\\[^\n]{1,8}|[^'\\\n])'/; // in languages whose lifetimes and apostrophes are no strings
const TEMPLATE = /`(?:\\[^]|[^`\\])*`?/;
const TRIPLE = /[rbfuRBFU]{0,2}"""[^]*?(?:"""|(?![^]))|[rbfuRBFU]{0,2}'''[^]*?(?:'''|(?![^]))/;
const NUMBER = /(?<![\w.])(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d[\d_]*)?(?:[eE][+-]?\d+)?)[a-zA-Z%]*/;
const WORD = /[A-Za-z_$][\w$]*/;
const C_WORDS = "if else for while do switch case default break continue return goto sizeof typedef struct union enum static const volatile extern inline void int long short char float double unsigned signed bool auto register true false null NULL nullptr";
const CURLY = { comment: [LINE.slashes, BLOCK], string: [DOUBLE, SINGLE], number: [NUMBER] };

const GROUPS = {
  python: { comment: [/#[^\n]*/], string: [TRIPLE, /[rbfuRBFU]{0,2}"(?:\\[^]|[^"\\\n])*"?/, /[rbfuRBFU]{0,2}'(?:\\[^]|[^'\\\n])*'?/], meta: [/@[\w.]+/], number: [NUMBER], words: words("and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield None True False self") },
  javascript: { ...CURLY, string: [DOUBLE, SINGLE, TEMPLATE], words: words("abstract as async await break case catch class const continue declare default delete do else enum export extends false finally for from function get if implements import in instanceof interface keyof let namespace new null of private protected public readonly return satisfies set static super switch this throw true try type typeof undefined var void while with yield string number boolean any unknown never") },
  c: { ...CURLY, meta: [/^[ \t]*#[^\n]*/m], words: words(`${C_WORDS} alignas catch class concept consteval constexpr constinit co_await co_return co_yield decltype delete explicit export final friend mutable namespace new noexcept operator override private protected public requires static_assert template this throw try typename using virtual wchar_t size_t int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t`) },
  java: { ...CURLY, string: [/"""[^]*?(?:"""|(?![^]))/, DOUBLE, SINGLE], meta: [/@[\w.]+/], words: words(`${C_WORDS} abstract as assert async await base boolean byte catch checked class companion data decimal delegate else event extends false final finally foreach fun get implements import in init instanceof interface internal is lateinit let lock namespace native new object open operator out override package params private protected public readonly record ref sbyte sealed set string super suspend synchronized this throw throws transient try typeof uint ulong using val var virtual when where yield`) },
  go: { ...CURLY, string: [DOUBLE, CHARACTER, /`[^`]*`?/], words: words("break case chan const continue default defer else fallthrough for func go goto if import interface map package range return select struct switch type var nil true false bool byte error float32 float64 int int8 int16 int32 int64 rune string uint uint8 uint16 uint32 uint64 any make new len cap append") },
  rust: { ...CURLY, string: [/b?r#*"[^]*?(?:"#*|(?![^]))/, /b?"(?:\\[^]|[^"\\])*"?/, CHARACTER], meta: [/#!?\[[^\]\n]*\]/, /\w+!/], words: words("as async await break const continue crate dyn else enum extern false fn for if impl in let loop match mod move mut pub ref return self Self static struct super trait true type union unsafe use where while bool char f32 f64 i8 i16 i32 i64 i128 isize str u8 u16 u32 u64 u128 usize") },
  swift: { ...CURLY, string: [/"""[^]*?(?:"""|(?![^]))/, DOUBLE], meta: [/[@#]\w+/], words: words("as associatedtype async await break case catch class continue default defer deinit do else enum extension fallthrough false fileprivate final for func guard if import in indirect init inout internal is lazy let mutating nil open operator override private protocol public repeat rethrows return self Self some static struct subscript super switch throw throws true try typealias var weak where while") },
  php: { ...CURLY, comment: [LINE.slashes, /#(?!\[)[^\n]*/, BLOCK], meta: [/<\?(?:php|=)?|\?>|\$\w+/], words: words("abstract and array as break case catch class clone const continue declare default do echo else elseif empty enum extends false final finally fn for foreach function global if implements include instanceof interface isset list match namespace new null or print private protected public readonly require require_once return static switch throw trait true try unset use var while yield") },
  shell: { comment: [LINE.hash], string: [/"(?:\\[^]|[^"\\])*"?/, /'[^']*'?/], meta: [/\$(?:\{[^}\n]*\}|\w+|[@*#?$!-])/, /(?<=\s)--?[a-zA-Z][\w-]*/], number: [NUMBER], words: words("if then else elif fi for while until do done case esac in function return exit export local readonly set unset source alias cd echo printf read test sudo true false select shift trap eval exec RUN FROM COPY ADD CMD ENTRYPOINT ENV ARG WORKDIR EXPOSE VOLUME USER LABEL") },
  ruby: { comment: [LINE.hash], string: [DOUBLE, SINGLE], meta: [/(?<!:):\w+|@{1,2}\w+/], number: [NUMBER], words: words("alias and begin break case class def do else elsif end ensure false for if in module next nil not or redo require require_relative rescue retry return self super then true undef unless until when while yield attr_accessor attr_reader puts defmodule defp fn") },
  lua: { comment: [/--\[\[[^]*?(?:\]\]|(?![^]))/, LINE.dashes], string: [/\[\[[^]*?(?:\]\]|(?![^]))/, DOUBLE, SINGLE], number: [NUMBER], words: words("and break do else elseif end false for function goto if in local nil not or repeat return then true until while") },
  sql: { comment: [LINE.dashes, BLOCK], string: [/'(?:''|[^'])*'?/, DOUBLE, /`[^`\n]*`?/], number: [NUMBER], folded: true, words: words("select from where and or not in is null as join left right inner outer full cross on using group by order having limit offset union all distinct insert into values update set delete create table view index drop alter add column primary key foreign references unique default check constraint if exists case when then else end like ilike between asc desc with recursive over partition returning begin commit rollback int integer bigint smallint text varchar char date timestamp boolean numeric decimal real float serial true false cast count sum avg min max") },
  r: { comment: [/#[^\n]*/], string: [DOUBLE, SINGLE], number: [NUMBER], words: words("if else repeat while function for in next break return TRUE FALSE NULL NA NaN Inf library require begin end do module using import export struct mutable abstract true false nothing let const global local macro quote elseif try catch finally") },
  haskell: { comment: [/--[^\n]*/, /\{-[^]*?(?:-\}|(?![^]))/, /\(\*[^]*?(?:\*\)|(?![^]))/], string: [DOUBLE, CHARACTER], number: [NUMBER], words: words("case class data deriving do else family forall foreign if import in infix infixl infixr instance let module newtype of qualified then type where match with fun rec val open begin end and function mutable try when yield") },
  lisp: { comment: [LINE.semicolon], string: [/"(?:\\[^]|[^"\\])*"?/], meta: [/(?<=[\s([]):[\w-]+/], number: [NUMBER], words: words("def defn defun defmacro defvar let lambda if cond when unless do loop fn ns require quote set setq begin define nil true false") },
  html: { comment: [/<!--[^]*?(?:-->|(?![^]))/], key: [/<\/?[A-Za-z][\w:.-]*|\/?>/, /<[!?][^>\n]*>/], name: [/[\w:@.-]+(?==)/], string: [/(?<==)"[^"]*"?/, /(?<==)'[^']*'?/, /&[#\w]+;/] },
  css: { comment: [BLOCK, /(?<![:\w])\/\/[^\n]*/], string: [DOUBLE, SINGLE], meta: [/@[\w-]+|--[\w-]+|\$[\w-]+/], name: [/[a-z-]+(?=[ \t]*:[ \t])/], number: [/#[\da-fA-F]{3,8}\b/, /(?<![\w-])-?(?:\d*\.)?\d+(?:[a-z]+|%)?/], words: words("important inherit initial unset none auto") },
  json: { comment: [LINE.slashes, BLOCK], name: [/"(?:\\[^]|[^"\\\n])*"(?=[ \t]*:)/], string: [DOUBLE], number: [/-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/], words: words("true false null") },
  yaml: { comment: [LINE.hash], name: [/^[ \t-]*[\w."/-]+(?=[ \t]*:(?:\s|$))/m], string: [DOUBLE, SINGLE], meta: [/[&*!][\w-]+/], number: [NUMBER], words: words("true false null yes no on off") },
  ini: { comment: [LINE.hash, /^[ \t]*;[^\n]*/m], key: [/^[ \t]*\[[^\n]*\]/m], name: [/^[ \t]*[\w."-]+(?=[ \t]*[=:])/m], string: [/"""[^]*?(?:"""|(?![^]))/, DOUBLE, SINGLE], number: [NUMBER], words: words("true false") },
  diff: { inserted: [/^\+[^\n]*/m], deleted: [/^-[^\n]*/m], meta: [/^@@[^\n]*/m, /^(?:diff|index)[^\n]*/m] },
  latex: { comment: [/(?<!\\)%[^\n]*/], key: [/\\(?:[a-zA-Z]+\*?|[^a-zA-Z\s])/], string: [/\$[^$\n]*\$/], meta: [/[{}]/] },
  make: { comment: [LINE.hash], meta: [/\$[({][^)}\n]*[)}]|\$[@<^*?]/], name: [/^[\w.%/-]+(?=[ \t]*:)/m], string: [DOUBLE, SINGLE], words: words("ifeq ifneq ifdef ifndef else endif include define endef export") },
};
const NAMES = {
  python: "py python3 pyi pycon ipython starlark", javascript: "js jsx ts tsx typescript mjs cjs node svelte", c: "h cpp c++ cc cxx hpp objc objective-c metal cuda cu glsl wgsl hlsl arduino",
  java: "kotlin kt kts cs csharp c# scala groovy gradle dart d solidity zig", go: "golang", rust: "rs", swift: "", php: "",
  shell: "sh bash zsh fish console shell-session shellscript powershell ps1 dockerfile docker", ruby: "rb elixir ex crystal perl pl", lua: "", sql: "postgresql mysql sqlite plsql",
  r: "julia jl", haskell: "hs ocaml ml fsharp elm", lisp: "clojure clj scheme elisp racket", html: "xml svg xhtml vue markup", css: "scss sass less",
  json: "jsonc json5 jsonl", yaml: "yml", ini: "toml cfg conf properties env", diff: "patch", latex: "tex", make: "makefile cmake",
};
const group = new Map(Object.entries(NAMES).flatMap(([name, others]) => [name, ...others.split(" ").filter(Boolean)].map((n) => [n, name])));
const ORDER = ["comment", "key", "name", "string", "inserted", "deleted", "meta", "number"];

// One expression with a named group for each color; made when a language is first seen.
function expression(rules) {
  if (!rules.expression) {
    const parts = ORDER.filter((name) => rules[name]).map((name) => `(?<${name}>${rules[name].map((r) => r.source).join("|")})`);
    if (rules.words) parts.push(`(?<word>${WORD.source})`);
    rules.expression = new RegExp(parts.join("|"), "gm");
  }
  return rules.expression;
}

// The class of a word: a keyword, what is called, a type; or null.
function wordClass(rules, word, next) {
  if (rules.words.has(rules.folded ? word.toLowerCase() : word)) return "keyword";
  if (next === "(") return "call";
  return /^[A-Z][A-Za-z\d]*[a-z]/.test(word) ? "type" : null;
}

// Shows the text in `code`, with colors. What was painted before the last full line stays, if the text begins
// as before.
export function paint(code, text, language) {
  const rules = text.length <= MOST_CHARACTERS ? GROUPS[group.get(language.toLowerCase())] : undefined;
  let { safe = 0, kept = 0, before = "", painted = null } = code.painting ?? {};
  if (painted !== rules || !text.startsWith(before)) safe = kept = 0;
  while (code.childNodes.length > kept) code.lastChild.remove();
  const made = document.createDocumentFragment();
  let plain = "";
  const flush = () => {
    if (plain) made.append(plain);
    plain = "";
  };
  // Text between tokens; a new line in it is where the next call can begin.
  const addPlain = (from, to) => {
    const end = text.lastIndexOf("\n", to - 1) + 1;
    if (end > from) {
      plain += text.slice(from, end);
      flush();
      safe = end;
      kept = code.childNodes.length + made.childNodes.length;
      from = end;
    }
    plain += text.slice(from, to);
  };
  let at = safe;
  if (rules) {
    const pattern = expression(rules);
    pattern.lastIndex = at;
    for (let match; (match = pattern.exec(text)) !== null;) {
      if (!match[0]) {
        pattern.lastIndex++;
        continue;
      }
      const { groups } = match;
      const name = groups.word === undefined ? ORDER.find((n) => groups[n] !== undefined) : wordClass(rules, match[0], text[pattern.lastIndex]);
      if (name === null) continue;
      addPlain(at, match.index);
      flush();
      const span = document.createElement("span");
      span.className = `code-${name}`;
      span.textContent = match[0];
      made.append(span);
      at = pattern.lastIndex;
    }
  }
  addPlain(at, text.length);
  flush();
  code.append(made);
  code.painting = { safe, kept, before: text.slice(0, safe), painted: rules };
}
