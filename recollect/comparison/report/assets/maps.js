// Attention maps of one example, before and after the convolution side by side, and the chosen row painted onto the text.
const MAP_NAMES = { before: "Before the convolution", after: "After the convolution", attention: "Attention" };

function drawMaps(section) {
  const found = DATA.inspections.filter((item) => item.maps.length);
  if (!found.length) return;
  section.hidden = false;
  const controls = document.getElementById("map-controls"), panels = document.getElementById("map-panels");
  const state = { item: richest(found), layer: 0, head: 0, query: null };
  const decoded = new Map();

  // The whole square map of one head as [T * T]; keys after the query are blank.
  function square(map, head) {
    if (!decoded.has(map)) decoded.set(map, halves(map.data));
    const flat = decoded.get(map), length = map.length, values = new Float32Array(length * length).fill(NaN);
    let at = (head * length * (length + 1)) / 2;
    for (let row = 0; row < length; row++) for (let col = 0; col <= row; col++) values[row * length + col] = flat[at++];
    return values;
  }

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
    controls.replaceChildren(
      select("mixer", found.map((item) => [item.label, `${item.label} (seed ${item.seed})`]), state.item.label, (value) => {
        state.item = found.find((item) => item.label === value);
        render();
      }),
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
    const length = map.length, head = Math.min(state.head, map.heads - 1), values = square(map, head);
    const finite = values.filter(Number.isFinite);
    const kind = finite.some((value) => value < -1e-6) ? "diverging" : "sequential";
    const scale = finite.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
    const title = MAP_NAMES[map.name] ?? map.name;
    const field = heatMap({
      rows: length, cols: length, values, scale, kind,
      label: `${title}, ${state.item.label}, layer ${map.layer}, head ${head}; arrow keys read values`,
      describe: (row, col) => `query ${named(row)}\nkey ${named(col)}\n${col > row ? "later than the query" : numberText(values[row * length + col])}`,
      picked: (row) => pick(row),
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
    const edge = [0, Math.floor((length - 1) / 2), length - 1];
    const ends = (axis) => node("div", { class: `ticks ${axis} ends`, "aria-hidden": "true" }, ...edge.map((i) => node("span", {}, String(i))));
    const shades = kind === "diverging" ? "var(--low),var(--zero),var(--high)" : "var(--zero),var(--warm)";
    const legend = node("span", { class: "scale" }, kind === "diverging" ? `\u2212${numberText(scale)}` : "0",
      node("i", { style: `background:linear-gradient(90deg,${shades})` }), numberText(scale));
    const figure = node("figure", {},
      node("figcaption", {}, node("strong", {}, title), legend),
      node("div", { class: "heat" }, ends("y"), field, node("span"), ends("x"), node("div", { class: "name" }, "key position \u2192, query position \u2193")),
      strip);

    // Paint the row of `query` on the tokens, on the row's own scale so that a spread-out row still shows.
    function mark(query) {
      Object.assign(line.style, { top: `${(100 * query) / length}%`, height: `${100 / length}%` });
      const row = values.subarray(query * length, query * length + query + 1);
      const most = row.reduce((best, value) => Math.max(best, Math.abs(value) || 0), 0) || 1;
      letters.forEach((letter, key) => {
        letter.className = key === query ? "query" : key > query ? "later" : "";
        letter.dataset.read = `key ${named(key)}\n${key > query ? "later than the query" : numberText(row[key])}`;
        const share = key > query ? 0 : row[key] / most;
        const color = kind === "diverging" ? (share < 0 ? "var(--low)" : "var(--high)") : "var(--warm)";
        letter.style.background = Math.abs(share) > 0.01 ? `color-mix(in srgb, ${color} ${Math.round(Math.abs(share) * 62)}%, transparent)` : "";
      });
    }
    return { figure, mark };
  }
  render();
}

drawMaps(document.getElementById("maps"));
