// Attention maps of one example, before and after the convolution side by side, and the chosen row painted onto the text.
const MAP_NAMES = { before: "Before the convolution", after: "After the convolution", attention: "Attention" };

function drawMaps(section) {
  const found = DATA.inspections.filter((item) => item.maps.length);
  if (!found.length) return;
  section.hidden = false;
  const panels = get("map-panels");
  const state = { item: richest(found), layer: 0, head: 0, query: null };

  const token = (i) => state.item.tokens[i] ?? "";
  const visible = (i) => (token(i) === " " ? "\u2423" : token(i) === "\n" ? "\u21b5" : token(i));
  const named = (i) => (visible(i) ? `${i} \u201c${visible(i)}\u201d` : String(i));

  function render() {
    const layers = [...new Set(state.item.maps.map((map) => map.layer))].sort((a, b) => a - b);
    if (!layers.includes(state.layer)) state.layer = layers[0];
    const maps = state.item.maps.filter((map) => map.layer === state.layer);
    const heads = Math.max(...maps.map((map) => map.heads)), length = maps[0].length;
    state.head = Math.min(state.head, heads - 1);
    state.query = Math.min(state.query ?? state.item.query ?? Infinity, length - 1);
    const slider = node("input", { type: "range", min: 0, max: length - 1, value: state.query, "aria-label": "query position" });
    const place = node("output", {}, named(state.query));
    const choose = (key) => (value) => { state[key] = Number(value); render(); };
    const count = (n) => Array.from({ length: n }, (_, i) => [i, i]);
    get("map-controls").replaceChildren(
      selectMixer(found, state.item, (chosen) => { state.item = chosen; render(); }),
      select("layer", layers.map((layer) => [layer, layer]), state.layer, choose("layer")),
      select("head", count(heads), state.head, choose("head")),
      node("label", {}, "query", slider, place),
    );
    const hiddenHeads = Math.max(...maps.map((map) => map.total)) - heads;
    const rows = maps.map((map) => panel(map, pick));
    panels.replaceChildren(node("div", { class: "panels" }, ...rows.map((row) => row.figure)));
    if (hiddenHeads) panels.append(node("p", { class: "note" }, `The first ${heads} heads are stored on this page; ${hiddenHeads} more are in inspection.safetensors.`));
    function pick(query) {
      state.query = query;
      slider.value = query;
      place.textContent = named(query);
      for (const row of rows) row.mark(query);
    }
    slider.addEventListener("input", () => pick(Number(slider.value)));
    pick(state.query);
  }

  function panel(map, pick) {
    const length = map.length, head = Math.min(state.head, map.heads - 1), values = square(map, length, head);
    const kind = values.some((value) => value < -1e-6) ? "diverging" : "sequential", scale = largest(values) || 1;
    const title = MAP_NAMES[map.name] ?? map.name;
    const field = heatMap({
      rows: length, cols: length, values, kind, share: (value) => value / scale,
      label: `${title}, ${state.item.label}, layer ${map.layer}, head ${head}; arrow keys read values`,
      describe: (row, col) => `query ${named(row)}\nkey ${named(col)}\n${col > row ? "later than the query" : numberText(values[row * length + col])}`,
      moved: pick,
    });
    const line = node("div", { class: "cursor row" });
    field.append(line);
    const strip = node("div", { class: "tokens", role: "group", "aria-label": `${title}: the query's row painted onto the text` });
    const letters = Array.from({ length }, (_, i) => {
      const letter = node("span", {}, visible(i) || "\u00b7");
      letter.addEventListener("pointerenter", (event) => showTip(letter.dataset.read, event.clientX, event.clientY));
      letter.addEventListener("pointerleave", hideTip);
      letter.addEventListener("click", () => { hideTip(); pick(i); });
      return letter;
    });
    strip.append(...letters);
    const range = legend(kind === "diverging" ? numberText(-scale) : "0", numberText(scale), kind);
    const figure = mapFigure(title, range, field, length);
    figure.append(strip);

    // Paint the row of `query` on the tokens, on the row's own scale so that a spread-out row still shows.
    function mark(query) {
      toRow(line, query, length);
      const row = values.subarray(query * length, query * length + query + 1), most = largest(row) || 1;
      letters.forEach((letter, key) => {
        letter.className = key === query ? "query" : key > query ? "later" : "";
        letter.dataset.read = `key ${named(key)}\n${key > query ? "later than the query" : numberText(row[key])}`;
        letter.style.background = key > query ? "" : wash(row[key] / most, kind, "62%");
      });
    }
    return { figure, mark };
  }
  render();
}

drawMaps(get("maps"));
