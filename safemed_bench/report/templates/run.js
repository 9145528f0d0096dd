"use strict";
(() => {
  document.documentElement.classList.add("scripted");
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text; // never innerHTML: what models write is text
    if (name) element.className = name;
    return element;
  };

  // -- tables: a button in each head, numbers by data-sort, words by themselves, a third click gives the first order --
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0], first = [...body.rows], heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = make("button", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const numeric = first.some((row) => row.cells[column].dataset.sort !== undefined);
        const order = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
        const now = order[(order.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
        heads.forEach((other) => other.setAttribute("aria-sort", other === head ? now : "none"));
        const sign = now === "descending" ? -1 : 1;
        const value = (row) => {
          const cell = row.cells[column];
          return numeric ? (cell.dataset.sort === undefined ? NaN : Number(cell.dataset.sort)) : cell.textContent;
        };
        const compare = (a, b) => {
          const x = value(a), y = value(b);
          if (!numeric) return sign * x.localeCompare(y, "en", { numeric: true });
          return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y) || 0; // what has no number comes last
        };
        table.classList.toggle("sorted", now !== "none");
        body.append(...(now === "none" ? first : [...first].sort(compare)));
      });
    });
  }

  // -- the records --
  const packed = $("records");
  if (!packed) return;
  const PAGE = 50, LETTERS = "ABCD";
  const WORDS = { i: "unreadable", t: "cut off", e: "error", "-": "missing" };
  let data, found = [], shown = 0, current = -1;

  async function unpack(text) {
    const letters = atob(text), bytes = new Uint8Array(letters.length);
    for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).json();
  }

  function prepare(raw) {
    const clean = new Map(raw.cells.filter((c) => c.condition === "clean").map((c) => [c.model, c]));
    for (const cell of raw.cells) cell.clean = clean.get(cell.model);
    return { ...raw, lower: undefined, place: new Map(raw.questions.id.map((id, i) => [id, i])) };
  }

  const string = (place) => (place < 0 ? "" : data.strings[place]);
  const right = (mark, q) => mark === LETTERS[data.questions.target[q]];
  const judged = (mark) => LETTERS.includes(mark) || mark === "i" || mark === "t";
  const said = (mark, q) => {
    if (mark in WORDS) return WORDS[mark];
    const option = data.questions.options[q][LETTERS.indexOf(mark)];
    return option === undefined ? mark : `${mark}) ${string(option)}`;
  };
  const sign = (mark, q) => (right(mark, q) ? "right" : judged(mark) ? "wrong" : "");

  const OUTCOMES = {
    right: (mark, before, q) => right(mark, q),
    wrong: (mark, before, q) => judged(mark) && !right(mark, q),
    turned: (mark, before, q) => before !== undefined && right(before, q) && judged(mark) && !right(mark, q),
    gained: (mark, before, q) => before !== undefined && judged(before) && !right(before, q) && right(mark, q),
    unreadable: (mark) => mark === "i" || mark === "t",
    missing: (mark) => mark === "e" || mark === "-",
  };

  function search() {
    const chosen = Object.fromEntries(["model", "condition", "modality", "type", "outcome"].map((k) => [k, $("f-" + k).value]));
    const words = $("f-text").value.trim().toLowerCase();
    const { questions, strings } = data;
    if (words) data.lower ??= strings.map((text) => text.toLowerCase()); // once, and only for who searches
    const hit = words && data.lower.map((text) => text.includes(words));
    const fits = questions.id.map((id, q) => {
      if (chosen.modality && strings[questions.modality[q]] !== chosen.modality) return 0;
      if (chosen.type && strings[questions.type[q]] !== chosen.type) return 0;
      // 2: the question itself has the words; 1: its replies may have them.
      return !words || id.toLowerCase().includes(words) || hit[questions.question[q]] || questions.options[q].some((o) => hit[o]) ? 2 : 1;
    });
    const outcome = OUTCOMES[chosen.outcome];
    const cells = data.cells.filter((cell) => (!chosen.model || cell.model === chosen.model) && (!chosen.condition || cell.condition === chosen.condition));
    found = [];
    for (let q = 0; q < fits.length; q++) {
      for (const cell of fits[q] ? cells : []) {
        if (cell.marks[q] === " ") continue; // not asked
        if (fits[q] === 1 && !(cell.texts[q] >= 0 && hit[cell.texts[q]])) continue;
        if (outcome && !outcome(cell.marks[q], cell.clean?.marks[q], q)) continue;
        found.push([cell, q]);
      }
    }
    shown = 0;
    $("found").replaceChildren();
    more();
    const n = new Set(found.map(([, q]) => q)).size;
    $("count").textContent = `${found.length.toLocaleString("en")} verdicts on ${n.toLocaleString("en")} questions`;
  }

  function more() {
    const rows = found.slice(shown, shown + PAGE).map(([cell, q]) => {
      const row = make("tr"), name = make("td", undefined, "left"), link = make("a", data.questions.id[q]);
      link.href = "#q=" + encodeURIComponent(data.questions.id[q]);
      name.append(link, make("small", [string(data.questions.modality[q]), string(data.questions.question[q])].filter(Boolean).join(" · ")));
      row.append(name, make("td", cell.model, "left"), make("td", cell.label, "left"));
      for (const from of [cell.clean, cell]) {
        row.append(from ? make("td", said(from.marks[q], q), "left " + sign(from.marks[q], q)) : make("td", "–", "left"));
      }
      row.append(make("td", string(cell.texts[q]), "left reply"));
      return row;
    });
    $("found").append(...rows);
    shown += rows.length;
    $("more").hidden = shown >= found.length;
  }

  // -- one question: all models, all conditions --
  function changed(before, after) {
    // The longest common words; long texts are shown without marks.
    const a = before.match(/\w+|[^\w\s]|\s+/g) || [], b = after.match(/\w+|[^\w\s]|\s+/g) || [];
    if (before === after || a.length * b.length > 250000) return [[after, false]];
    const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    const pieces = [];
    const add = (word, mark) => {
      if (pieces.length && pieces.at(-1)[1] === mark) pieces.at(-1)[0] += word;
      else pieces.push([word, mark]);
    };
    for (let i = 0, j = 0; j < b.length; ) {
      if (i < a.length && a[i] === b[j]) { add(b[j], false); i++; j++; }
      else if (i < a.length && length[i + 1][j] >= length[i][j + 1]) i++;
      else add(b[j++], true);
    }
    return pieces;
  }

  function open(q) {
    current = q;
    const { questions } = data, body = $("q-body"), title = make("h3", string(questions.question[q]) || questions.id[q]);
    title.id = "q-title";
    const options = make("p", undefined, "options");
    questions.options[q].forEach((o, i) => options.append(make("span", `${LETTERS[i]}) ${string(o)}`, i === questions.target[q] ? "true" : "")));
    const table = make("table"), head = make("tr"), rows = make("tbody"), top = make("thead");
    for (const word of ["model", "condition", "answer", "reply"]) { const th = make("th", word, "left"); th.scope = "col"; head.append(th); }
    for (const cell of data.cells.filter((c) => c.marks[q] !== " ")) {
      const row = make("tr"), reply = make("td", undefined, "left reply"), mark = cell.marks[q];
      const base = cell.clean && cell !== cell.clean ? string(cell.clean.texts[q]) : undefined, text = string(cell.texts[q]);
      if (base === undefined || !base) reply.textContent = text;
      else for (const [words, is] of changed(base, text)) reply.append(make(is ? "mark" : "span", words));
      row.append(make("td", cell.model, "left"), make("td", cell.label, "left"), make("td", said(mark, q), "left " + sign(mark, q)), reply);
      rows.append(row);
    }
    top.append(head);
    table.append(top, rows);
    body.replaceChildren(make("p", [questions.id[q], string(questions.modality[q]), string(questions.type[q])].join(" · "), "small"), title, options, table);
    if (!$("question").open) $("question").showModal();
    $("question").scrollTop = 0;
  }

  function step(by) {
    const order = [...new Set(found.map(([, q]) => q))];
    const at = order.indexOf(current);
    const next = order[at < 0 ? 0 : (at + by + order.length) % order.length];
    if (next !== undefined) location.hash = "q=" + encodeURIComponent(data.questions.id[next]);
  }

  function follow() {
    if (!location.hash.startsWith("#q=")) return $("question").open && $("question").close();
    let id = location.hash.slice(3);
    try { id = decodeURIComponent(id); } catch { /* as it stands */ }
    const q = data.place.get(id);
    if (q !== undefined) open(q);
    else $("count").textContent = `There is no question ${id} in this run.`;
  }

  function listen() {
    let timer;
    $("filters").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(search, 120); });
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("clear").addEventListener("click", () => {
      for (const field of $("filters").querySelectorAll("select, input")) field.value = "";
      search();
    });
    $("more").addEventListener("click", more);
    $("q-close").addEventListener("click", () => $("question").close());
    $("q-previous").addEventListener("click", () => step(-1));
    $("q-next").addEventListener("click", () => step(1));
    $("question").addEventListener("close", () => {
      if (location.hash.startsWith("#q=")) history.replaceState(null, "", location.pathname + location.search);
    });
    $("question").addEventListener("click", (event) => event.target === $("question") && $("question").close());
    $("question").addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
    addEventListener("hashchange", follow);
  }

  unpack(packed.textContent).then((raw) => {
    data = prepare(raw);
    listen();
    search();
    follow();
    document.documentElement.dataset.seconds = (performance.now() / 1000).toFixed(3);
    document.documentElement.dataset.ready = "yes";
  }, (error) => {
    $("count").textContent = `The records of this page cannot be read by this browser (${error}); they are in records.jsonl.`;
  });
})();
