// The sections with pictures: token maps, neighbors and duplicates.

function showTokenMaps() {
  const section = byId('token-maps');
  const { maps, explained, stores_tokens: storesTokens } = data.token_maps;
  if (!maps.length) {
    const why = storesTokens ? 'No image was sampled (--samples 0).' : images.keys.length
      ? 'This output holds one vector per image and no tokens (--tokens none), so there is nothing to draw.' : 'No image has features yet.';
    section.append(make('p', {}, why));
    return;
  }
  const [red, green, blue] = explained.map(percent);
  section.append(make('p', { class: 'faint' },
    `Similar tokens have similar colors in all of these pictures. Red, green and blue are the first three principal components of the tokens of ${plural(maps.length, 'sampled image')}, with ${red}, ${green} and ${blue} of their variance.`));
  const frames = maps.map(tokenMap);
  const slider = make('input', { type: 'range', id: 'opacity', min: 0, max: 100, value: 75, oninput: () => fade() });
  const fade = () => frames.forEach((frame) => frame.querySelector('.tokens').style.setProperty('opacity', slider.value / 100));
  section.append(make('div', { class: 'controls' }, make('label', { for: 'opacity' }, 'Opacity of the maps'), slider));
  section.append(make('div', { class: 'maps' }, ...frames));
  fade();
}

function tokenMap(entry) {
  const { image, box, photograph, problem } = entry;
  const key = images.keys[image];
  const frame = make('div', { class: 'overlay' });
  const ratio = images.width[image] / images.height[image];
  frame.style.aspectRatio = String(Math.min(4, Math.max(0.25, ratio)));
  if (ratio < 1) frame.style.width = `${Math.max(30, 100 * ratio)}%`;
  if (photograph) frame.append(make('img', { src: `data:image/jpeg;base64,${photograph}`, alt: `photograph ${key}` }));
  const tokens = make('img', { class: 'tokens', src: `data:image/png;base64,${entry.map}`, alt: `principal components of ${key}` });
  ['left', 'top', 'width', 'height'].forEach((side, place) => { tokens.style[side] = `${100 * box[place]}%`; });
  frame.append(tokens);
  const caption = make('figcaption', {}, make('div', { title: key }, shortened(key, 64)), make('div', { class: 'faint' }, sizeOf(image)));
  if (problem) caption.append(make('div', { class: 'faint' }, `photograph not shown: ${problem}`));
  return make('figure', {}, frame, caption);
}

/** Create a thumbnail that shows its place on the map when it is clicked. */
function card(image, caption, isFirst = false) {
  const key = images.keys[image];
  const button = make('button', { type: 'button', title: key, 'aria-label': `show ${key} on the map`, onclick: () => showOnMap(image) }, thumbnail(image));
  const told = make('figcaption', {}, make('div', { class: 'faint' }, caption), make('div', { class: 'key', title: key }, shortened(key.split('/').at(-1), 40)));
  return make('figure', { class: isFirst ? 'first' : '' }, button, told);
}

function spaceWords(found) {
  if (found.space === 'raw') return `cosines of the vectors as stored, ${found.space_reason}`;
  return `cosines balanced over ${plural(found.fitted_on, 'image')}: 0 is as similar as any two images here, 1 is the same`;
}

function howTold(found) {
  if (!found.pictures) return `${spaceWords(found)}, from ${found.threshold} on`;
  const { same, different, unseen } = found.pictures;
  const alone = unseen ? `; of ${plural(unseen, 'pair')} a picture was missing, and a cosine of at least ${found.threshold} decided` : '';
  return `the pictures of ${plural(same + different, 'pair')} with similar vectors were compared, and ${count(same)} show the same${alone}. Numbers are ${spaceWords(found)}`;
}

function showNeighbors() {
  const section = byId('neighbors');
  const rows = data.neighbors.rows.filter((row) => row.hits.length);
  if (!rows.length) {
    section.append(make('p', {}, images.keys.length > 1 ? 'No image was sampled (--samples 0).' : 'It takes two images with features to compare.'));
    return;
  }
  section.append(make('p', { class: 'faint' }, `Each of ${plural(rows.length, 'sampled image')} (framed) with the images most similar to it. Numbers are ${spaceWords(data.neighbors)}. Click an image to see it on the map.`));
  for (const { image, hits } of rows) {
    const found = hits.map(([hit, cosine]) => card(hit, cosine.toFixed(3)));
    section.append(make('div', { class: 'row' }, card(image, 'sample', true), ...found));
  }
}

function showDuplicates() {
  const section = byId('duplicates');
  const found = data.duplicates;
  if (!found.similar.length && !found.identical.length) {
    const all = images.keys.length > 1 ? 'None: no two pictures show the same or have the same bytes.' : 'It takes two images with features to compare.';
    section.append(make('p', {}, all));
    return;
  }
  section.append(make('p', { class: 'faint' },
    `Keeping one image of each group would drop ${plural(found.redundant, 'image')}. ${found.how ? `How similar images were found: ${howTold(found)}. ` : ''}The largest picture of each group is framed.`));
  showGroups(section, 'similar images', found.similar, found.similar_sizes, found.similar_groups, ([image, cosine], place) => card(image, place ? cosine.toFixed(3) : 'largest', !place));
  showGroups(section, 'identical files', found.identical, found.identical_sizes, found.identical_groups, (image, place) => card(image, 'same bytes', !place));
}

function showGroups(section, noun, groups, sizes, total, draw) {
  if (!groups.length) return;
  const some = groups.length < total ? `, the first ${groups.length} of them shown` : '';
  section.append(make('h3', {}, `${plural(total, 'group')} of ${noun}${some}`));
  const boxes = groups.map((group, number) => {
    const more = sizes[number] - group.length;
    const rest = more ? [make('figure', {}, make('figcaption', {}, `and ${count(more)} more`))] : [];
    return make('div', { class: 'group' }, ...group.map(draw), ...rest);
  });
  section.append(make('div', { class: 'groups' }, ...boxes));
}
