// The sections with texts and numbers.

function showHead() {
  byId('path').textContent = data.path;
  byId('made').textContent = `Written ${data.made} by internvit ${data.version}`;
  for (const title of document.querySelectorAll('main h2')) {
    const link = make('a', { href: `#${title.parentElement.id}` }, title.textContent);
    document.querySelector('nav').append(link);
  }
  for (const note of data.notes) byId('notes').append(make('p', { class: 'note' }, note));
}

function showSummary() {
  const { images: statuses, ...summary } = data.summary;
  const done = statuses.done ?? 0;
  const pending = statuses.pending ?? 0;
  const skipped = data.skipped.total;
  const cards = [['Images', count(summary.total_images)], ['With features', count(done)]];
  cards.push(['Skipped', skipped ? make('a', { href: '#skipped' }, count(skipped)) : '0']);
  if (pending) cards.push(['Pending', count(pending)]);
  cards.push(['Tiles', count(summary.tiles)], ['On disk', bytes(summary.bytes)]);
  if (summary.shards > 1) cards.push(['Shards', count(summary.shards)]);
  const card = ([name, value]) => make('div', { class: 'card' }, make('dt', {}, name), make('dd', {}, value));
  byId('summary').append(make('dl', { class: 'cards' }, ...cards.map(card)));
  const parts = [['with features', done, 'done'], ['skipped', skipped, 'skip'], ['pending', pending, 'pending']].filter((part) => part[1]);
  const bar = make('div', { class: 'bar', 'aria-hidden': 'true' });
  const legend = make('ul', { class: 'legend' });
  for (const [name, number, kind] of parts) {
    const piece = make('span', { class: kind });
    piece.style.width = `${(100 * number) / summary.total_images}%`;
    bar.append(piece);
    legend.append(make('li', {}, make('span', { class: `dot ${kind}` }), `${name} ${count(number)} (${percent(number / summary.total_images)})`));
  }
  const rows = [['Model', `${summary.model} ${summary.model_revision}`.trim()], [summary.sources.length === 1 ? 'Source' : 'Sources', summary.sources.join(', ') || 'none'], ['Written by', summary.created_by]];
  byId('summary').append(bar, legend, factTable('Summary', rows));
  const columns = [['Dataset', 'short'], ['Shape', 'short'], ['Type', 'short'], ['Holds']];
  const datasets = data.datasets.map(([name, shape, type]) => [name, shape, type, holdingOf(name)]);
  byId('summary').append(make('h3', {}, 'Datasets'), table('Datasets', columns, datasets));
}

/** Describe a dataset in words. */
function holdingOf(name) {
  if (name.includes('scales')) return 'one scale per token of a quantized type';
  if (name.startsWith('pooled')) return 'one vector per image, a row per image';
  if (name.startsWith('tile_pooled')) return 'one vector per tile, a row per tile';
  if (name.includes('tokens')) return 'a row per tile: tokens, and the values of each';
  return '';
}

function showRecipe() {
  const intro = 'Everything that decides a stored value. Features of different recipes cannot be compared.';
  byId('recipe').append(make('p', { class: 'faint' }, intro), factTable('Recipe', data.recipe.map(([name, value]) => [words(name), value])));
}

function rate(number, time) {
  if (number === undefined || !(time > 0)) return '';
  const speed = number / time;
  return speed < 1000 ? speed.toFixed(speed < 10 ? 2 : 1) : count(Math.round(speed));
}

function showThroughput() {
  const section = byId('throughput');
  if (!data.runs.length) {
    section.append(make('p', {}, 'No run has recorded its speed.'));
    return;
  }
  const last = data.runs.at(-1);
  const columns = [['Ended', 'short'], ['Device', 'short'], ['Type', 'short'], ['Images', 'number'], ['Tiles', 'number'], ['Duration', 'number'], ['Images/s', 'number'], ['Tiles/s', 'number'], ['Host', 'short']];
  const optional = (number) => (number === undefined ? '' : count(number));
  const rows = data.runs.map((run) => [
    (run.ended ?? '').slice(0, 19).replace('T', ' '), run.device ?? '', run.dtype ?? '', optional(run.images), optional(run.tiles),
    run.seconds === undefined ? '' : seconds(run.seconds), rate(run.images, run.seconds), rate(run.tiles, run.seconds), run.host ?? '',
  ]);
  if (last.bottleneck) section.append(make('p', {}, `Last run: ${last.bottleneck}`));
  section.append(table('Runs that wrote rows', columns, rows, 'tall'));
  section.append(make('p', { class: 'faint' }, 'Durations are those of the encoding, from the first picture that was decoded to the last row on the disk.'));
}

function showTiles() {
  const section = byId('tiles');
  if (!data.histogram.length) {
    section.append(make('p', {}, 'No image has features yet.'));
    return;
  }
  const done = data.histogram.reduce((sum, [, number]) => sum + number, 0);
  const tiles = data.histogram.reduce((sum, [tile, number]) => sum + tile * number, 0);
  section.append(make('p', { class: 'faint' }, `Number of images by number of tiles, including thumbnails; on average ${(tiles / done).toFixed(1)} tiles per image.`));
  const box = make('div', {});
  const rows = data.histogram.map(([tile, number]) => [count(tile), count(number), percent(number / done)]);
  const columns = [['Tiles', 'number'], ['Images', 'number'], ['Share', 'number']];
  section.append(box, make('details', {}, make('summary', {}, 'The same as a table'), table('Images by tiles', columns, rows, 'narrow')));
  const draw = () => box.replaceChildren(histogram(data.histogram, box.clientWidth, done));
  new ResizeObserver(draw).observe(box);
}

/** Draw a histogram as SVG for the available width, so that letters keep their size. */
function histogram(entries, width, done) {
  const space = 'http://www.w3.org/2000/svg';
  const part = (tag, attributes, text = '') => {
    const node = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.textContent = text;
    return node;
  };
  const [height, below, above] = [210, 38, 20];
  const last = entries.at(-1)[0];
  const step = Math.min(64, width / Math.max(1, last));
  const most = Math.max(...entries.map(([, number]) => number));
  const told = entries.map(([tile, number]) => `${number} with ${tile}`).join(', ');
  const svg = part('svg', { width, height, role: 'img', 'aria-label': `${done} images by tiles: ${told}` });
  const every = Math.ceil(26 / step);
  for (const [tile, number] of entries) {
    const tall = Math.max(2, ((height - below - above) * number) / most);
    const middle = (tile - 0.5) * step;
    const column = part('rect', { class: 'column', x: middle - 0.4 * step, y: height - below - tall, width: 0.8 * step, height: tall, rx: 2 });
    column.append(part('title', {}, `${plural(tile, 'tile')}: ${plural(number, 'image')}`));
    svg.append(column);
    if (step >= 7 * count(number).length) svg.append(part('text', { x: middle, y: height - below - tall - 6, 'text-anchor': 'middle' }, count(number)));
  }
  for (let tile = 1; tile <= last; tile += 1) {
    if ((tile - 1) % every === 0) svg.append(part('text', { x: (tile - 0.5) * step, y: height - below + 16, 'text-anchor': 'middle' }, String(tile)));
  }
  svg.append(part('line', { class: 'axis', x1: 0, x2: step * last, y1: height - below, y2: height - below }));
  svg.append(part('text', { x: (step * last) / 2, y: height - 4, 'text-anchor': 'middle' }, 'tiles'));
  return svg;
}

function showSkipped() {
  const { total, reasons, rows, list } = data.skipped;
  const section = byId('skipped');
  if (!total) {
    section.append(make('p', {}, 'None: every image that was looked at has features.'));
    return;
  }
  const listed = rows.length < total ? `The first ${count(rows.length)} of ${count(total)} are listed here; ${list} has all of them. ` : '';
  section.append(make('p', { class: 'faint' }, `${listed}These pictures could not be encoded and have no features; reading them is an error that gives this reason.`));
  const place = make('div', {});
  const columns = [['Key', 'key'], ['Reason', 'short'], ['Message', 'message']];
  const draw = (reason) => {
    const shown = rows.filter((row) => reason === '' || row.reason === reason);
    place.replaceChildren(table('Skipped images', columns, shown.map((row) => [row.key, words(row.reason), row.message]), 'tall'));
    for (const button of chips.children) button.setAttribute('aria-pressed', button.dataset.reason === reason);
  };
  const chip = ([reason, number]) => make('button', { type: 'button', 'data-reason': reason, onclick: () => draw(reason) }, `${words(reason) || 'all'} ${count(number)}`);
  const chips = make('div', { class: 'chips', role: 'group', 'aria-label': 'Reasons' }, ...[['', total], ...Object.entries(reasons)].map(chip));
  section.append(chips, place);
  draw('');
}
